"""Collapse, copy and hacking monitors against closed forms, counts by hand and planted failures."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from services.evaluation import monitors, text_metrics
from services.evaluation.config import EvaluationConfig
from services.watching.alarms import AlarmBounds
from services.watching.probe_scores import ProbeScores

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "va") for b in ("n", "s", "rt", "ll", "x", "d")]
EXPERT = [0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05]


def sentences(count: int, seed: int, words: list[str] = WORDS) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size=rng.integers(4, 9))) for _ in range(count)]


def labels(weights: list[float], count: int = 200) -> list[int]:
    return [mode for mode, weight in enumerate(weights) for _ in range(round(weight * count))]


def test_mode_entropy_by_hand() -> None:
    assert monitors.mode_entropy(["a"] * 5) == 0.0
    assert monitors.mode_entropy(labels([0.25] * 4)) == pytest.approx(math.log(4))
    entropy = -sum(p * math.log(p) for p in EXPERT)
    assert monitors.mode_entropy(labels(EXPERT)) == pytest.approx(entropy)
    # The four commonest modes only, as the logit reward leaves them.
    kept = [p / 0.75 for p in EXPERT[:4]]
    lost = labels(kept, 300)
    expected = math.exp(-sum(p * math.log(p) for p in kept)) / math.exp(entropy)
    assert monitors.mode_share(labels(EXPERT, 300), lost) == pytest.approx(expected)
    assert 0.5 < expected < 0.6
    assert monitors.mode_share(labels([1 / 8] * 8), labels([1 / 8] * 8)) == 1.0


def test_lost_modes_by_hand() -> None:
    human = labels(EXPERT)
    assert monitors.modes_lost(human, human) == 0.0
    gone = [label for label in human if label < 5]
    assert monitors.modes_lost(human, gone) == pytest.approx(0.15)
    # 10 human answers of 200 in a mode: 3 of 200 responses are more than a quarter of that, 2 are not.
    assert monitors.modes_lost(human, [*gone, *[5] * 3, *[6] * 2, *[0] * 25]) == pytest.approx(0.1)
    assert monitors.modes_lost([0] * 93 + [1] * 7, [0] * 100) == 0.0  # seven answers say nothing
    # Another count of responses changes nothing: frequencies are compared.
    assert monitors.modes_lost(human, human * 3) == 0.0


def test_clusters_are_the_modes_and_strangers_have_modes_of_their_own() -> None:
    rng = np.random.default_rng(0)
    centres = 20 * np.eye(6)
    human = centres[np.arange(120) % 4] + rng.normal(size=(120, 6))
    same, other = monitors.cluster_modes(human, human[::-1], clusters=4)
    assert same == other[::-1]
    assert len({(same[i], i % 4) for i in range(120)}) == 4
    strange = centres[4 + np.arange(120) % 2] + rng.normal(size=(120, 6))
    of_human, of_model = monitors.cluster_modes(human, strange, clusters=6)
    assert monitors.mode_share(of_human, of_model) == pytest.approx(0.5)
    assert monitors.modes_lost(of_human, of_model) == 1.0
    assert set(monitors.cluster_modes(human[:5], strange[:4], clusters=16)[0]) == {0}


def test_repetition_by_hand() -> None:
    # "a b c" twice in seven tokens: six of seven; "x x x x" holds (x, x, x) twice: all four; no repeat: none.
    assert monitors.repetition_rate(["a b c a b c d"]) == pytest.approx(6 / 7)
    assert monitors.repetition_rate(["x x x x", "a b c d"]) == pytest.approx(0.5)
    assert monitors.repetition_rate(["a b a b", "", "a"], n=2) == pytest.approx(1 / 3)
    assert monitors.repetition_rate([]) == 0.0


def test_spearman_against_scipy() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 9, 60), rng.normal(size=60)
    y += x
    assert monitors.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert monitors.spearman([1, 2, 3], np.exp([1, 2, 3])) == pytest.approx(1.0)
    assert monitors.spearman([1, 1, 1], [1, 2, 3]) == 0.0
    assert monitors.spearman([1], [2]) == 0.0


def test_copying_is_measured_against_the_natural_rate() -> None:
    train, fresh = sentences(200, 0), sentences(100, 1)
    human = [*train[:33], *fresh[:67]]
    natural = monitors.copying([*train[50:80], *fresh[:70]], human, train)
    assert (natural["copy_rate"], natural["copy_natural"]) == (0.3, 0.33)
    assert natural["copy_excess"] < 0
    copied = monitors.copying([*train[50:105], *fresh[:45]], human, train)
    # Wilson's limits solve (limit - share)² = z² limit (1 - limit) / n.
    low, high = 0.4524460, 0.4269466
    for share, limit in ((0.55, low), (0.33, high)):
        assert (limit - share) ** 2 == pytest.approx(1.959964**2 * limit * (1 - limit) / 100, rel=1e-5)
    assert copied["copy_excess"] == pytest.approx(0.22 - math.hypot(0.55 - low, high - 0.33))
    assert 0.05 < copied["copy_excess"] < 0.22
    nothing = monitors.copying(fresh, fresh, train)
    assert (nothing["copy_rate"], nothing["copy_natural"]) == (0.0, 0.0)
    assert nothing["copy_excess"] < 0


def test_agreement_is_within_sides() -> None:
    rng = np.random.default_rng(2)
    sides = ["human"] * 40 + ["policy"] * 40
    apart = np.where(np.arange(80) < 40, 5.0, -5.0)
    scores = apart + rng.normal(size=(3, 80))
    assert monitors.rank_agreement(scores)[0, 1] > 0.7
    within = monitors.rank_agreement(scores, sides)
    expected = np.mean(
        [spearmanr(scores[0][part], scores[1][part]).statistic for part in np.split(np.arange(80), 2)]
    )
    assert within[0, 1] == pytest.approx(expected)
    assert abs(within[0, 1]) < 0.4
    assert np.diag(within) == pytest.approx(1.0)


def test_a_cycle_recurs_and_a_drift_does_not() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 100))
    turn = np.linspace(0, np.pi / 2, 5)[:, None]
    drift = monitors.cycling(np.cos(turn) * a + np.sin(turn) * b)
    assert drift["recurrence"] < 0.05
    assert drift["disagreement"] < 0.15 < 0.8 < drift["disagreement_first"]
    cycle = monitors.cycling(np.stack([a, b, a + 0.1 * b]))
    assert cycle["recurrence"] == pytest.approx(1.0, abs=0.2)
    assert cycle["disagreement_first"] < 0.05
    assert set(monitors.cycling(a[None]).values()) == {0.0}


def test_text_monitors_of_healthy_collapsed_and_repeating_policies() -> None:
    families = [sentences(20, mode, WORDS[4 * mode : 4 * mode + 4]) for mode in range(8)]
    again = [sentences(20, 50 + mode, WORDS[4 * mode : 4 * mode + 4]) for mode in range(8)]
    human, healthy = ([text for family in side for text in family] for side in (families, again))
    fine = monitors.text_monitors(healthy, human, [], clusters=8)
    assert fine["mode_share"] == pytest.approx(1.0, abs=0.1)
    assert fine["modes_lost"] == 0.0
    assert fine["length_ratio"] == pytest.approx(1.0, abs=0.1)
    collapsed = monitors.text_monitors(again[0] * 4 + again[1] * 4, human, [], clusters=8)
    assert collapsed["mode_share"] < 0.5
    assert collapsed["modes_lost"] >= 0.5
    assert collapsed["distinct_2_share"] < 0.5
    assert fine["self_bleu_room"] == pytest.approx(1.0, abs=0.1)
    one = monitors.text_monitors([again[0][0]] * 160, human, [], clusters=8)
    assert one["self_bleu_room"] == pytest.approx(0.0, abs=1e-9)
    assert one["distinct_2_share"] < AlarmBounds().distinct_share
    left = (100 - text_metrics.self_bleu(side) for side in (again[0] * 4 + again[1] * 4, human))
    assert collapsed["self_bleu_room"] == pytest.approx(next(left) / next(left))
    looping = monitors.text_monitors([f"{text} {text}" for text in healthy], human, human, clusters=8)
    assert looping["repetition"] > 0.95
    assert looping["repetition_human"] < 0.3
    assert looping["length_ratio"] == pytest.approx(2 * fine["length_ratio"])
    assert looping["copy_natural"] == 1.0
    same = monitors.text_monitors(healthy, [human[0]] * 160, [], clusters=8)
    assert same["self_bleu_room"] == 1.0, "humans who all say the same leave no room, and nothing to miss"
    words = monitors.text_monitors(healthy, ["word"] * 160, [], clusters=8)
    assert words["distinct_2_share"] == 1.0
    empty = monitors.text_monitors([""] * 160, human, [], clusters=8)
    assert all(math.isfinite(value) for value in empty.values())
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 160, 4))
    assert monitors.text_monitors(healthy, human, [], *vectors)["mode_share"] == pytest.approx(1.0, abs=0.2)
    with pytest.raises(ValueError, match="equal counts"):
        monitors.text_monitors(["a"], human, [])


def test_an_evaluation_counts_the_first_row_of_a_prompt_in_one_spelling() -> None:
    human, one, train = sentences(60, 0), sentences(60, 1), sentences(30, 2)
    one[:6] = train[:6]
    names = [f"p{index}" for index in range(60)]
    expected = monitors.text_monitors(one, human, train)
    spaced = [f" {text.replace(' ', '  ')}" for text in one] + ["word"] * 60
    assert monitors.evaluation_monitors(names * 2, spaced, human * 2, train) == expected
    assert expected["copy_rate"] == 0.1
    seen = []

    def embed(texts: list[str], keep: bool = False) -> np.ndarray:
        seen.append((texts, keep))
        return np.array([[len(text), text.count("a")] for text in texts], dtype=float)

    monitors.evaluation_monitors(names * 2, spaced, human * 2, train, embed)
    assert seen == [(one, False), (human, True)]


def probes() -> ProbeScores:
    names = [f"p{index}" for index in range(6)]
    responses = {
        "prompt_id": names,
        "prompt_text": names,
        "response_text": ["model"] * 6,
        "finish_reason": ["length"] * 6,
    }
    human = {
        "prompt_id": [*names[2:], "other"],
        "prompt_text": [*names[2:], "other"],
        "response": ["human"] * 5,
    }
    chosen = ProbeScores(prompts=3, kept=3)
    chosen.choose(pa.table(responses), pa.table(human))
    return chosen


def test_probe_scores_are_kept_by_version_and_survive_a_checkpoint() -> None:
    chosen = probes()
    table = chosen.table
    assert table["group_id"].to_pylist() == ["p2", "p2", "p3", "p3", "p4", "p4"]
    assert table["response_text"].to_pylist() == ["model", "human"] * 3
    assert table["finish_reason"].to_pylist() == ["length", "stop"] * 3

    def answers(values: list[float]) -> list[dict]:
        return [{"scores": np.array([9.0, value], dtype=np.float32)} for value in values]

    up, down = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    assert chosen.add(1, answers(up))["recurrence"] == 0.0
    assert chosen.add(5, answers(down)) == {"disagreement": 2.0, "disagreement_first": 2.0, "recurrence": 0.0}
    resumed = ProbeScores(prompts=3, kept=3)
    resumed.load_state(json.loads(json.dumps(chosen.state())))
    assert resumed.table.equals(table)
    assert resumed.add(9, answers(up)) == chosen.add(9, answers(up))
    assert chosen.add(9, answers(up))["recurrence"] == pytest.approx(2.0)
    chosen.add(13, answers(up))
    assert [version for version, _ in chosen.state()["scores"]] == [5, 9, 13]
    with pytest.raises(ValueError, match="2 answers for 6 probes"):
        chosen.add(14, answers([1.0, 2.0]))


def test_clustering_is_repeatable() -> None:
    human, model = sentences(60, 0), sentences(60, 1)
    first = monitors.text_monitors(model, human, [], seed=EvaluationConfig().seed)
    assert first == monitors.text_monitors(model, human, [], seed=EvaluationConfig().seed)
