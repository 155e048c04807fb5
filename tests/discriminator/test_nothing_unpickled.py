"""A pickle in the place of any file that is read from a run's folder or a model's is refused, never run."""

import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from judging import judged, small

from discriminator.buffer import ReplayBuffer
from discriminator.config import BufferConfig
from discriminator.exported import exported_state, read_exported, write_exported
from discriminator.trainer import DiscriminatorTrainer
from learner.config import LearnerConfig
from learner.pretrained import load_body, load_causal_lm
from learner.rank import LearnerRank
from rollout.config import PolicyConfig, RolloutConfig
from rollout.templates import load_tokenizer
from services.checkpoint import Checkpoints, verify

SETTINGS = {"advantage": "gae", "kl_coef": 0.1, "kl_target": 0.1, "lora": {"rank": 2}, "device": "cpu"}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def bombs(proof: Path, folder: Path) -> list[bytes]:
    """Pickled plainly, and as torch saves."""
    torch.save({"updates": Bomb(proof)}, folder / "bomb.pt")
    return [pickle.dumps(Bomb(proof)), (folder / "bomb.pt").read_bytes()]


def learner_rank(model: Path) -> LearnerRank:
    policy, learner = PolicyConfig(model=str(model), dtype="float32"), LearnerConfig(**SETTINGS)
    return LearnerRank(
        rank=0, ranks=1, learner=learner, policy=policy, rollout=RolloutConfig(), temperature=1.0, seed=0
    )


def policy_state(model: Path, folder: Path):
    rank = learner_rank(model)
    rank.keep()
    rank.save(str(folder))
    return lambda: rank.load(str(folder))


def discriminator_state(model: Path, folder: Path):
    rows = judged([(f"say {i}: ", f"the cat {i}") for i in range(9)])
    trainer = DiscriminatorTrainer(small(batch_size=8), str(model), seed=0)
    trainer.update(rows, rows, step=0)
    trainer.save(folder)
    return lambda: trainer.load(folder)


def discriminator_export(model: Path, folder: Path):
    trainer = DiscriminatorTrainer(small(batch_size=8), str(model), seed=0)
    write_exported(folder, trainer.publish(), trainer.config, str(model), "float32")
    return lambda: (read_exported(folder), exported_state(folder))


def buffer(model: Path, folder: Path):
    folder.mkdir()
    ReplayBuffer(BufferConfig()).dump(folder / "buffer.parquet")
    return lambda: ReplayBuffer(BufferConfig()).load(folder / "buffer.parquet")


def checkpoint(model: Path, folder: Path):
    checkpoints = Checkpoints(folder, 1)
    checkpoints.begin(3)
    checkpoints.commit(3, {"controller": {}})
    return lambda: verify(folder / "step-000003")


def model_folder(model: Path, folder: Path):
    """Its weights as `.bin` files, as hubs have them."""
    shutil.copytree(model, folder)
    weights = load_causal_lm(str(model), dtype=torch.float32, device=torch.device("cpu")).state_dict()
    torch.save(dict(weights), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    def load() -> None:
        load_causal_lm(str(folder), dtype=torch.float32, device=torch.device("cpu"))
        load_body(str(folder), dtype=torch.float32)
        load_tokenizer(PolicyConfig(model=str(folder), dtype="float32"))

    return load


PLACES = [policy_state, discriminator_state, discriminator_export, buffer, checkpoint, model_folder]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_pickle_is_not_executed(tiny_model, tmp_path, place):
    folder, proof = tmp_path / "read", tmp_path / "proof"
    load = place(tiny_model, folder)
    load()
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    assert files
    for bomb in bombs(proof, tmp_path):
        for file in files:
            whole = file.read_bytes()
            file.write_bytes(bomb)
            with suppress(Exception):  # refused in many words, or not looked at
                load()
            file.write_bytes(whole)
            assert not proof.exists(), f"{file.relative_to(folder)} was executed"
    load()


def test_the_pickles_here_are_executed_by_who_unpickles(tmp_path):
    for number, bomb in enumerate(bombs(tmp_path / "proof", tmp_path)):
        if number == 0:
            pickle.loads(bomb)
        else:
            torch.load(tmp_path / "bomb.pt", weights_only=False)
        assert (tmp_path / "proof").exists()
        (tmp_path / "proof").unlink()


def test_a_state_holds_nothing_that_could_be_a_pickle(tiny_model, tmp_path):
    policy_state(tiny_model, tmp_path / "state")
    names = {file.suffix for file in (tmp_path / "state").rglob("*") if file.is_file()}
    assert names == {".safetensors", ".json"}
    assert (tmp_path / "state/critic/engine.json").is_file()
