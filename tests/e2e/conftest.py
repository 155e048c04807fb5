"""Fixtures shared by the end-to-end tests."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import launching
import pytest
import ray
from launching import PROMPTS, SAMPLES, START_S, STEPS, Launch

from services.ray_access import reread


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray of its own, whatever else runs on this machine. It ends with its module: this process's
    Ray, its address and its token are not those that tests elsewhere look at."""
    before = dict(os.environ)  # `ray.init` turns token authentication on for whatever this process does next
    folder = tempfile.mkdtemp(prefix="rlgaf-ray-", dir="/tmp")  # Ray's socket paths must stay short
    with pytest.MonkeyPatch.context() as patch:
        limits = "services.endpoint:proxy_middleware"
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", limits)
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=200_000_000,
            include_dashboard=False,
            namespace="rlgaf-e2e",
            _temp_dir=folder,
        )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.clear()
    os.environ.update(before)
    reread()


@pytest.fixture(scope="session")
def configuration(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_demonstrations: Path
) -> Path:
    """TOML of a run of 8 steps; its run folders lie beside it."""
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "run.toml"
    file.write_text(
        f"""
        [run]
        output = "{folder}"
        steps = {STEPS}
        prompts_per_step = {PROMPTS}
        checkpoint_every = 0
        [data]
        demonstrations = "{tiny_demonstrations}"
        max_prompt_tokens = 32
        heldout_fraction = 0.2
        selection_fraction = 0.2
        test_fraction = 0.2
        [policy]
        model = "{tiny_model}"
        dtype = "float32"
        [sampling]
        group_size = {SAMPLES}
        max_tokens = 16
        [rollout]
        start_timeout_s = {START_S}
        [learner]
        lr = 1e-3
        start_timeout_s = {START_S}
        [discriminator]
        lr = 1e-3
        start_timeout_s = {START_S}
        batch_size = 16
        warmup_max_steps = 10
        [discriminator.audit]
        base_samples = 32
        [discriminator.health]
        enabled = false  # or the discriminator, which wins here, would pause
        [evaluation]
        every = 4
        look_every = 2
        prompts = 16
        test_prompts = 16
        bootstrap = 100
        embedding_model = "none"
        """
    )
    return file


@pytest.fixture(scope="session")
def launch(configuration: Path) -> Launch:
    """`launch(name, {"run.steps": "3"}, resume=..., meanwhile=...)` runs `rlgaf train` to its end."""
    return partial(launching.launch, configuration)
