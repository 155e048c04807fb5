"""The scoring service on real Ray Serve: two replicas, named versions, identical scores, HTTP with a bearer
token.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from free_ports import free_ports
from ray import serve

from discriminator.config import DiscriminatorConfig, ScoringConfig
from discriminator.exported import write_exported
from discriminator.model import load_discriminator
from discriminator.scorer import Scorer
from discriminator.trainer import Published
from discriminator.versions import UnknownVersion, VersionStore, state_checksum
from services.config import ConfigError
from services.endpoint import open_door
from services.scoring import deploy
from services.serving import Arguments, app

pytestmark = pytest.mark.e2e

TOKEN = "only-for-this-test"
GROUP = [("the cat sat on the mat", True), ("the door", True), ("sells sea", False)]


def state_of(config: DiscriminatorConfig, model: str, shift: float) -> dict[str, torch.Tensor]:
    module = load_discriminator(config, model, device="cpu", dtype=torch.float32, seed=3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.add_(
                    shift * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.fixture(scope="module")
def service(
    ray_cluster: None, tiny_model: Path
) -> Iterator[tuple[Any, Any, DiscriminatorConfig, dict[int, Any], str]]:
    scoring = ScoringConfig(replicas=2, http=True, http_port=0, http_token="RLGAF_TEST_TOKEN", cpus=0.5)
    config = DiscriminatorConfig(scoring=scoring, device="cpu")
    states = {version: state_of(config, str(tiny_model), 0.02 * version) for version in (0, 1, 2)}
    store = ray.remote(VersionStore).options(num_cpus=0).remote()
    for version in (0, 1):
        ray.get(store.publish.remote(version, state_checksum(states[version]), [ray.put(states[version])]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLGAF_TEST_TOKEN", TOKEN)
        handle = deploy("scoring-test", config, str(tiny_model), "float32", store, threads=1, use_gpu=False)
        door, url = open_door(handle, scoring)
    yield handle, store, config, states, url
    ray.kill(door)
    serve.shutdown()


def local_scores(
    config: DiscriminatorConfig, model: Path, states: dict[int, Any], version: int
) -> list[np.ndarray]:
    scorer = Scorer(config, str(model), model_dtype="float32")
    scorer.ensure(version, lambda v: (state_checksum(states[v]), states[v]))
    return [item.scores for item in scorer.score(version, ["say cat: "], [GROUP])[0]]


def test_every_replica_answers_with_the_named_version_and_the_same_scores(
    service: Any, tiny_model: Path
) -> None:
    handle, _, config, states, _ = service
    for version in (0, 1):
        expected = local_scores(config, tiny_model, states, version)
        calls = [handle.measured_score.remote(version, [("say cat: ", GROUP)]) for _ in range(12)]
        for call in calls:  # both replicas get some, in batches of different sizes
            [scored], memory = call.result(timeout_s=60)
            assert 50 < memory < 5000, "MiB of a process that has torch and a tiny model"
            for item, scores in zip(scored, expected, strict=True):
                np.testing.assert_allclose(item["scores"], scores, atol=1e-4)
    first, second = (local_scores(config, tiny_model, states, v)[0][-1] for v in (0, 1))
    assert abs(first - second) > 1e-3, "the versions must differ, or the test shows nothing"


def test_a_request_of_several_groups_is_answered_group_by_group(service: Any, tiny_model: Path) -> None:
    handle, _, config, states, _ = service
    expected = [scores[-1] for scores in local_scores(config, tiny_model, states, 1)]
    groups = [("say cat: ", [text]) for text in GROUP]
    two = [handle.score.remote(1, groups[:2]), handle.score.remote(1, groups[2:])]
    scored = [group for call in two for group in call.result(timeout_s=60)]
    np.testing.assert_allclose([item["scores"][-1] for [item] in scored], expected, atol=1e-4)
    with pytest.raises(Exception, match="greater than max_batch_size"):
        handle.score.remote(1, groups * config.scoring.max_batch_groups).result(timeout_s=60)


def test_versions_in_one_batch_are_kept_apart(service: Any, tiny_model: Path) -> None:
    handle, _, config, states, _ = service
    expected = {v: local_scores(config, tiny_model, states, v)[0][-1] for v in (0, 1)}
    calls = [(v, handle.score.remote(v, [("say cat: ", GROUP)])) for v in (0, 1, 0, 1, 1, 0)]
    for version, call in calls:
        assert call.result(timeout_s=60)[0][0]["scores"][-1] == pytest.approx(expected[version], abs=1e-4)


def test_a_request_for_a_version_that_is_gone_harms_no_other_in_its_batch(
    service: Any, tiny_model: Path
) -> None:
    handle, _, config, states, _ = service
    expected = local_scores(config, tiny_model, states, 1)[0][-1]
    calls = [(v, handle.score.remote(v, [("say cat: ", GROUP)])) for v in (1, 7) * 12]
    for version, call in calls:
        if version == 7:
            with pytest.raises(UnknownVersion, match="version 7 is not held"):
                call.result(timeout_s=60)
        else:
            assert call.result(timeout_s=60)[0][0]["scores"][-1] == pytest.approx(expected, abs=1e-4)


def test_a_version_that_is_gone_is_refused_not_replaced(service: Any) -> None:
    handle, store, _, states, _ = service
    with pytest.raises(Exception, match="version 7 is not held"):
        handle.score.remote(7, [("say cat: ", GROUP)]).result(timeout_s=60)
    ray.get(store.publish.remote(2, state_checksum(states[2]), [ray.put(states[2])]))
    assert ray.get(store.versions.remote()) == [1, 2]
    [scored] = handle.score.remote(2, [("say cat: ", GROUP)]).result(timeout_s=60)
    assert len(scored) == len(GROUP)


def test_http_needs_the_token_and_gives_the_same_scores(service: Any, tiny_model: Path) -> None:
    _, _, config, states, url = service
    body = {"prompt": "say cat: ", "responses": [text for text, _ in GROUP[:2]], "disc_version": 1}
    assert post(url, body, "wrong")[0] == 401
    status, answer = post(url, body, TOKEN)
    assert status == 200
    assert answer["disc_version"] == 1
    expected = [scores[-1] for scores in local_scores(config, tiny_model, states, 1)[:2]]
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-4)
    assert post(url, {**body, "disc_version": 7}, TOKEN)[0] == 404
    assert post(url, {"prompt": "x", "responses": []}, TOKEN)[0] == 422
    assert post(url, {"prompt": "x", "responses": ["half a character: \ud83d"]}, TOKEN)[0] == 422


def test_a_taken_port_is_named(service: Any) -> None:
    handle, _, config, _, url = service
    port = int(url.split(":")[2].split("/")[0])
    with pytest.raises(RuntimeError, match=rf"127\.0\.0\.1:{port}.*in use; change discriminator\.scoring\."):
        open_door(handle, config.scoring.model_copy(update={"http_port": port}))


def test_runs_share_no_service_and_a_killed_run_leaves_none(service: Any, tiny_model: Path) -> None:
    handle, _, config, states, _ = service
    other = ray.remote(VersionStore).options(num_cpus=0).remote()
    state = state_of(config, str(tiny_model), 0.07)
    ray.get(other.publish.remote(1, state_checksum(state), [ray.put(state)]))
    alone = config.model_copy(update={"scoring": ScoringConfig(cpus=0.5)})
    second = deploy("scoring-other", alone, str(tiny_model), "float32", other, threads=1, use_gpu=False)
    expected = [local_scores(config, tiny_model, given, 1)[0] for given in (states, {1: state})]
    for asked, scores in zip((handle, second), expected, strict=True):
        [scored] = asked.score.remote(1, [("say cat: ", GROUP)]).result(timeout_s=60)
        np.testing.assert_allclose(scored[0]["scores"], scores, atol=1e-4)
    ray.kill(other)  # what is left of a run whose driver was killed
    deadline = time.monotonic() + 60
    while "scoring-other" in serve.status().applications:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert "scoring-test" in serve.status().applications


@pytest.fixture
def served(service: Any, tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> tuple[str, list[float]]:
    """Where what a finished run leaves is served by itself in place of `service`; its scores by another
    path."""
    serve.shutdown()
    config = DiscriminatorConfig(scoring=ScoringConfig(http_token="RLGAF_TEST_TOKEN", cpus=0.5), device="cpu")
    state = state_of(config, str(tiny_model), 0.05)
    published = Published(4, state, state_checksum(state))
    write_exported(tmp_path / "discriminator", published, config, str(tiny_model), "float32")
    monkeypatch.setenv("RLGAF_TEST_TOKEN", TOKEN)
    [port] = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(Arguments(run=tmp_path, model=str(tiny_model))), name="served-test", route_prefix="/")
    scores = [float(scores[-1]) for scores in local_scores(config, tiny_model, {4: state}, 4)[:2]]
    return f"http://127.0.0.1:{port}/v1/score", scores


def test_a_finished_runs_discriminator_is_served_by_itself(served: Any) -> None:
    url, expected = served
    body = {"prompt": "say cat: ", "responses": [text for text, _ in GROUP[:2]]}
    assert post(url, body, "wrong")[0] == 401
    status, answer = post(url, body, TOKEN)
    assert status == 200
    assert answer["disc_version"] == 4
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-4)
    assert post(url, {**body, "disc_version": 3}, TOKEN)[0] == 404
    large = {**body, "prompt": "x" * 2**20}
    assert post(url, large, "wrong")[0] == 413, "the proxy, which has no token here, refuses it unread"


def test_serving_says_what_is_missing(tmp_path: Path, tiny_model: Path, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match=r"holds no discriminator\.json"):
        app(Arguments(run=tmp_path))
    config = DiscriminatorConfig(scoring=ScoringConfig(http_token="RLGAF_NO_TOKEN"))
    state = state_of(config, str(tiny_model), 0.0)
    published = Published(0, state, state_checksum(state))
    write_exported(tmp_path / "discriminator", published, config, str(tiny_model), "float32")
    monkeypatch.delenv("RLGAF_NO_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="set the variable RLGAF_NO_TOKEN"):
        app(Arguments(run=tmp_path))


def post(url: str, body: dict[str, Any], token: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    for _ in range(30):
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, {}
        except urllib.error.URLError:
            time.sleep(1)  # the proxy is still coming up
    raise TimeoutError("the HTTP proxy never came up")
