"""What may be begun in a run's folder, and what may be gone on with."""

import errno
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_folders import checkpointed

from rollout.data import SPLITS, DataError, DataSplits
from services.checkpoint import MANIFEST, STATE, seal
from services.config import Config, ConfigError, load
from services.jobs.resumption import find_checkpoint
from services.run_folder import check_data_of, check_folder, check_resume, data_digests


def run_of(tmp_path: Path, **settings: object) -> Config:
    words = {"policy.model": "m", "data.demonstrations": "d", "run.output": tmp_path, "run.steps": 6}
    return load(None, [f"--{name}={value}" for name, value in (words | settings).items()])


def resumed(config: Config, step: int | None = None, auto: bool = False) -> tuple[Config, list[str]]:
    """The configuration that the run goes on with, and what is said."""
    said: list[str] = []
    check_folder(config, resume=True, auto=auto)
    found = find_checkpoint(config, auto=auto, step=step, say=said.append)
    assert found is not None
    return check_resume(config, found, said.append), said


def summed_up(config: Config, step: int) -> None:
    (config.folder / "summary.json").write_text(json.dumps({"steps": step}))


def test_a_run_whose_steps_are_done_has_its_closing_evaluation_to_do(tmp_path):
    config = run_of(tmp_path)
    checkpointed(config, 6)
    assert resumed(config) == (config, [])
    summed_up(config, 6)
    with pytest.raises(ConfigError, match=r"has done 6 of 6 steps; raise run\.steps"):
        resumed(config)


def test_the_summary_of_fewer_steps_is_not_this_ones(tmp_path):
    """Four steps to their end, then raised to six, of which the closing evaluation was broken off."""
    config = run_of(tmp_path)
    checkpointed(config, 4)
    summed_up(config, 4)
    assert resumed(config) == (config, [])
    checkpointed(config, 6)
    assert resumed(config) == (config, [])


def test_early_stopping_ends_a_run_once_it_is_summed_up(tmp_path):
    config = run_of(tmp_path, **{"run.method": "sft", "learner.sft.patience": 2})
    checkpointed(config, 4, early={"looks": 2})
    assert resumed(config) == (config, [])
    summed_up(config, 4)
    with pytest.raises(ConfigError, match=r"early stopping at step 4; raise learner\.sft\.patience"):
        resumed(config)


def test_a_broken_newest_checkpoint_is_passed_over_and_named(tmp_path):
    config = run_of(tmp_path)
    checkpointed(config, 2)
    (checkpointed(config, 4) / "weights").write_text("torn")
    for auto in (False, True):
        assert resumed(config, auto=auto)[1] == [
            f"passed over: {config.folder}/checkpoints/step-000004: weights differs from the manifest"
        ]
    (config.folder / "checkpoints" / "step-000002" / "state.json").unlink()
    with pytest.raises(
        ConfigError, match=r"no whole checkpoint: .*step-000004: weights .*step-000002: state\.json"
    ):
        resumed(config, auto=True)
    assert (config.folder / "checkpoints").is_dir(), "nothing is set aside where there are checkpoints"


def test_a_run_goes_on_from_the_step_that_is_asked_for(tmp_path):
    config = run_of(tmp_path, **{"run.keep_checkpoints": 3})
    for step in (2, 4):
        checkpointed(config, step)
    found = find_checkpoint(config, auto=False, step=2, say=print)
    assert found is not None
    assert found.state["controller"] == {"step": 2}
    with pytest.raises(ConfigError, match=r"--from-step 3: .* has checkpoints of the steps: 2, 4"):
        find_checkpoint(config, auto=False, step=3, say=print)


@pytest.mark.parametrize(
    ("field", "other", "reason"),
    [
        ("run.method", "gad", "another method"),
        ("run.seed", 1, "drawn with the other"),
        ("policy.model", "other", "weights are of the other"),
        ("discriminator.model", "other", "weights are of the other"),
        ("learner.lora.rank", 8, "adapters"),
        ("learner.lora.alpha", 8.0, "adapters"),
        ("discriminator.lora.rank", 8, "adapters"),
        ("learner.advantage", "gae", "lacks what that needs"),
        ("learner.kl_target", 0.1, "lacks what that needs"),
        ("data.split_seed", 1, "splits"),
        ("data.test_fraction", 0.2, "splits"),
        ("data.prompt_template", "Q: {prompt}", "splits"),
        ("data.max_demonstrations", 7, "splits"),
    ],
)
def test_what_cannot_differ_is_refused_before_anything_is_written(tmp_path, field, other, reason):
    checkpointed(run_of(tmp_path), 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(
        ConfigError, match=rf"^--resume: {re.escape(field)} = .*the checkpoint has .*{reason}"
    ):
        resumed(run_of(tmp_path, **{field: other}))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("learner.loss", "ppo_clip"),
        ("learner.lr", 1e-3),
        ("discriminator.level", "token"),
        ("discriminator.loss", "least_squares"),
        ("discriminator.spectral_norm", 1.0),
        ("learner.gumbel.weight", 0.5),
        ("discriminator.reward.form", "prob"),
        ("sampling.temperature", 0.5),
        ("run.max_policy_lag", 1),
        ("data.demonstrations", "elsewhere"),
        ("policy.model", "/mounted/m"),
    ],
)
def test_what_changes_the_run_is_named(tmp_path, field, other):
    checkpointed(run_of(tmp_path), 4)
    more = {"discriminator.reward.form": "logit"} if other == "least_squares" else {}
    config = run_of(tmp_path, **{field: other}, **more)
    going, said = resumed(config)
    assert going == config
    assert sorted(line.split(" = ")[0] for line in said) == sorted(
        f"changed: {name}" for name in (field, *more)
    )
    assert all("the checkpoint has" in line for line in said)


def test_a_part_that_is_not_used_any_more_is_left_out(tmp_path):
    checkpointed(run_of(tmp_path, **{"learner.advantage": "gae", "learner.kl_target": 0.1}), 4)
    said = resumed(run_of(tmp_path))[1]
    assert {line.split()[1] for line in said} == {"learner.advantage", "learner.kl_target"}


FREE = {
    "run.steps": 9,
    "run.checkpoint_every": 1,
    "rollout.workers": 3,
    "learner.ranks": 2,
    "learner.zero_stage": 3,
    "learner.micro_batch_tokens": 512,
    "discriminator.ranks": 2,
    "discriminator.zero_stage": 2,
    "discriminator.scoring.replicas": 2,
    "learner.step_timeout_s": 60.0,
}


def test_ranks_stages_and_places_may_differ_without_a_word(tmp_path):
    checkpointed(run_of(tmp_path), 4)
    assert resumed(run_of(tmp_path, **FREE))[1] == []


def test_an_exact_run_hears_of_whatever_rounds_otherwise(tmp_path):
    exact = {"run.exact": True}
    checkpointed(run_of(tmp_path, **exact), 4)
    said = resumed(run_of(tmp_path, **exact, **FREE))[1]
    unchanged = {"run.steps", "run.checkpoint_every", "learner.step_timeout_s"}
    assert {line.split()[1] for line in said} == set(FREE) - unchanged


def test_what_the_run_settled_stays(tmp_path):
    """`auto` was float32 where the run began; where it goes on it might be another."""
    checkpointed(run_of(tmp_path, **{"policy.dtype": "float32"}), 4)
    going, said = resumed(run_of(tmp_path))
    assert (going.policy.dtype, said) == ("float32", [])
    assert resumed(run_of(tmp_path, **{"policy.dtype": "bfloat16"}))[1] == [
        'changed: policy.dtype = "bfloat16", the checkpoint has "float32"'
    ]


def test_a_schedule_ends_where_it_was_to_end(tmp_path):
    falls = {"learner.lr_schedule": "linear"}
    checkpointed(run_of(tmp_path, **falls), 4)
    going, said = resumed(run_of(tmp_path, **falls))
    assert (going.learner.schedule_steps, said) == (6, [])
    shorter, said = resumed(run_of(tmp_path, **falls, **{"run.steps": 5}))
    assert (shorter.learner.schedule_steps, said) == (6, [])
    with pytest.raises(
        ConfigError, match=r"falls until update 6, .* there are 9; say learner\.schedule_steps = 9"
    ):
        resumed(run_of(tmp_path, **falls, **{"run.steps": 9}))
    stretched = run_of(tmp_path, **falls, **{"run.steps": 9, "learner.schedule_steps": 9})
    assert resumed(stretched)[1] == ["changed: learner.schedule_steps = 9, the checkpoint has 6"]
    kept = run_of(tmp_path, **falls, **{"run.steps": 9, "learner.schedule_steps": 6})
    assert resumed(kept)[1] == [
        "changed: learner.schedule_steps = 6: the learning rate is 0 from then on, of 9 updates"
    ]


def test_other_code_is_named(tmp_path, monkeypatch):
    checkpointed(run_of(tmp_path), 4)
    monkeypatch.setattr("services.run_folder.code_version", lambda: {"rlgaf": "9", "torch": "1"})
    said = resumed(run_of(tmp_path))[1]
    assert any(line.startswith("changed: rlgaf 9, the checkpoint was written by 0.1.0+") for line in said)
    assert any(line.startswith("changed: torch 1, ") for line in said)


@pytest.mark.parametrize("make", ["file", "parent is a file", "link to nothing", "too long"])
def test_a_place_where_no_folder_can_be_is_refused(tmp_path, make):
    output = tmp_path / "out"
    if make == "file":
        output.mkdir()
        (output / "run").write_text("mine")
    elif make == "parent is a file":
        output.write_text("mine")
    elif make == "link to nothing":
        output.symlink_to(tmp_path / "nowhere")
    else:
        output = tmp_path / ("x" * 300)
    with pytest.raises(ConfigError, match=r"^run\.output: .* cannot be written") as refused:
        check_folder(run_of(tmp_path, **{"run.output": output}), resume=False, auto=False)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("why", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_takes_nothing_is_refused(tmp_path, monkeypatch, why):
    """Tests may run as root, to whom every folder is open: the disk's answer is made up."""

    def full(**_: object) -> None:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ConfigError, match=os.strerror(why)):
        check_folder(run_of(tmp_path), resume=False, auto=False)


def test_looking_leaves_nothing_behind(tmp_path):
    check_folder(run_of(tmp_path), resume=False, auto=False)
    assert list(tmp_path.iterdir()) == []


def splits_of(**responses: str) -> DataSplits:
    rows = {"prompt_id": ["a", "b"], "response": ["x", "y"]}
    tables = {name: rows | {"response": ["x", responses.get(name, "y")]} for name in SPLITS}
    return DataSplits(**{name: pa.table(table) for name, table in tables.items()}, extra_prompts=pa.table({}))


@pytest.mark.parametrize("split", SPLITS)
def test_other_answers_in_any_split_are_refused(tmp_path, split):
    """A run of `sft` has no cursor that would notice."""
    config = run_of(tmp_path, **{"run.method": "sft"})
    folder = checkpointed(config, 4)
    state = json.loads((folder / STATE).read_text()) | {"data": data_digests(splits_of())}
    (folder / STATE).write_text(json.dumps(state))
    (folder / MANIFEST).unlink()
    seal(folder, 4)
    found = find_checkpoint(config, auto=False, step=None, say=print)
    assert found is not None
    renderer: Any = None  # only a cursor needs one
    check_data_of(config, splits_of(), renderer, found)
    with pytest.raises(DataError, match=f"the data of the splits {split} are not those of the checkpoint"):
        check_data_of(config, splits_of(**{split: "z"}), renderer, found)
