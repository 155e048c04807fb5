"""The `rlgaf` command: exit codes, help, and arguments that reach the configuration."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.cli import main
from services.config import load

ROOT = Path(__file__).parents[2]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of `rlgaf WORDS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["rlgaf", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    path.write_text(f'[policy]\nmodel = "org/model"\n[data]\ndemonstrations = "{tmp_path}/d.jsonl"\n')
    return path


@pytest.mark.parametrize("command", ["train", "config", "doctor", "assets", "evaluate", "generate", "export"])
def test_every_command_explains_itself(monkeypatch, capsys, command):
    assert call(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown
    assert len(shown.splitlines()) > 5


def test_overrides_of_every_kind_reach_the_configuration(monkeypatch, capsys, run_file):
    words = [
        "--learner.lr",
        "1e-5",
        "--run.seed",
        "3",
        "--learner.betas",
        "[0.8, 0.9]",
        "--run.name=mine",
        "--dry-run",
    ]
    assert call(monkeypatch, "train", str(run_file), *words) == 0
    shown = capsys.readouterr().out
    for line in ("lr = 1e-05", "seed = 3", "betas = [0.8, 0.9]", 'name = "mine"'):
        assert line in shown.splitlines()


def test_the_readmes_example_trains_adapters_and_is_a_configuration(tmp_path):
    (example,) = re.findall(r"<<'EOF'\n(.*?)\nEOF\n", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "run.toml").write_text(example)
    config = load(tmp_path / "run.toml")
    assert config.data.demonstrations == "answers.jsonl"
    assert config.learner.lora.rank > 0
    assert config.discriminator.lora.rank > 0


def test_options_and_overrides_may_be_mixed(monkeypatch, capsys, run_file):
    assert call(monkeypatch, "train", "--dry-run", str(run_file), "--run.steps", "3") == 0
    assert "steps = 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learner.lrr", "1"], "unknown field learner.lrr; did you mean learner.lr"),
        (["--run.steps"], "--run.steps: a value is missing"),
        (["--run.steps=0"], "run.steps"),
        (["stray"], "unexpected argument 'stray'"),
        (["--resme"], "resme"),
        (["--run.exact=true", "--run.max_policy_lag=2"], "run.exact needs"),
    ],
)
def test_user_errors_are_one_line_each_and_exit_with_2(monkeypatch, capsys, run_file, words, named):
    assert call(monkeypatch, "train", str(run_file), "--dry-run", *words) == 2
    shown = capsys.readouterr()
    assert named in shown.err
    assert "Traceback" not in shown.err
    assert all(line.startswith("rlgaf: ") for line in shown.err.splitlines())
    assert shown.out == ""


def test_missing_file_and_missing_argument(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "train", str(tmp_path / "absent.toml")) == 2
    assert "absent.toml: no such configuration file" in capsys.readouterr().err
    assert call(monkeypatch, "train") == 2


@pytest.mark.parametrize("field", ["demonstrations", "prompts"])
def test_data_that_are_not_there_are_named_at_once(monkeypatch, capsys, run_file, field):
    began = time.monotonic()
    for words in (["--dry-run"], []):
        assert call(monkeypatch, "train", str(run_file), *words, f"--data.{field}=absent.jsonl") == 2
        assert capsys.readouterr().err == "rlgaf: absent.jsonl: no such file or folder\n"
    assert time.monotonic() - began < 5, "well under a second on a machine at rest"


def test_a_plan_that_no_machine_can_hold_is_shown_all_the_same(monkeypatch, capsys, run_file):
    assert call(monkeypatch, "train", str(run_file), "--dry-run", "--rollout.workers=99") == 0
    assert "99 x 0.5 CPU" in capsys.readouterr().out


def test_a_plan_that_cannot_be_is_refused(monkeypatch, capsys, run_file):
    assert (
        call(
            monkeypatch, "train", str(run_file), "--dry-run", "--rollout.device=cuda", "--learner.device=cpu"
        )
        == 2
    )
    assert "rollout.device is cuda and learner.device cpu" in capsys.readouterr().err


def test_generate_needs_something_to_answer(monkeypatch, capsys):
    assert call(monkeypatch, "generate", "org/model") == 2
    assert "--prompt" in capsys.readouterr().err


def test_unknown_asset_names_the_known_ones(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "assets", "nonsense", "--out", str(tmp_path / "assets")) == 2
    assert "nonsense" in capsys.readouterr().err
    assert not (tmp_path / "assets").exists()
    assert call(monkeypatch, "assets") == 0
    assert "smollm2" in capsys.readouterr().out


def test_export_refuses_in_words(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "export", str(tmp_path / "no-run"), str(tmp_path / "out")) == 2
    assert "holds no model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_does_not_overwrite_its_report(
    monkeypatch, capsys, tmp_path, tiny_model, tiny_demonstrations
):
    out = tmp_path / "report.json"
    out.write_text(json.dumps({"kept": True}))
    assert call(monkeypatch, "evaluate", str(tiny_model), str(tiny_demonstrations), "--json", str(out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert json.loads(out.read_text()) == {"kept": True}


def test_the_installed_command_is_this_one():
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for command in ("train", "config", "doctor", "assets", "evaluate", "generate", "export"):
        assert command in done.stdout
