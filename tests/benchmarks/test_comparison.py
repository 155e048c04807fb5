"""Runs of several methods become one table, its curves, and a sentence on how far each method comes."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer
from run_folders import finished_run
from typer.testing import CliRunner

from benchmarks import comparison
from benchmarks.document import markers
from services.config import load

ROOT = Path(__file__).parents[2]


def test_runs_are_kept_and_reported(tmp_path: Path) -> None:
    results, out = tmp_path / "raw", tmp_path / "docs" / "results.md"
    for entry, seed, best in (
        ("sft", 0, 0.5),
        ("sft", 1, 0.5),
        ("rlgaf, per token, absorbing end", 0, 0.6),
        ("gad", 0, 0.8),
    ):
        folder = tmp_path / "runs" / f"{entry}{seed}"
        finished_run(folder, seed, entry, best)
        kept = CliRunner().invoke(
            comparison.app, ["keep", str(folder), "quickstart", entry, "--results", str(results)]
        )
        assert kept.exit_code == 0, kept.output
    assert (results / "quickstart" / "rlgaf-per-token-absorbing-end.seed0.json").is_file()
    begin, end = markers("quickstart", comparison.COMMAND)
    out.parent.mkdir()
    out.write_text(f"{begin}\n{end}\n")
    said = CliRunner().invoke(comparison.app, ["report", "--results", str(results), "--out", str(out)])
    assert said.output == "quickstart: 4 runs\n"
    text = out.read_text()
    assert "| base | 4 | 0.900 |" in text
    assert "| sft | 2 | 0.500 |" in text
    assert "| human | 4 | 0.500 | - | - | - |" in text
    assert "per token, absorbing end: of the way from the base to sft in C2ST 75%, NLL 75%, chrF 75%." in text
    assert "* gad: of the way from the base to sft in C2ST 25%, NLL 25%, chrF 25%." in text
    for axis in ("minutes", "samples"):
        file = out.parent / "figures" / f"quickstart-{axis}.svg"
        assert len(ElementTree.parse(file).getroot().findall("{*}polyline")) == 3


def test_every_method_runs_once_before_any_runs_twice() -> None:
    order = comparison.wanted(comparison.COMPARISONS["debian-synopses"])
    assert [seed for _, seed in order] == [0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert {entry.method for entry, _ in order[:6]} == {"sft", "rlgaf", "rlhf", "gad"}


def _as_it_is(found: comparison.Comparison) -> set[str]:
    """The variations that are what the example does anyway."""
    usual = load(ROOT / found.example, ["--run.method", "rlgaf"])
    ways = (comparison.WHOLE, comparison.PER_TOKEN, comparison.ABSORBING)
    return {way.name for way in ways if load(ROOT / found.example, [*way.options]) == usual}


@pytest.mark.parametrize("name", comparison.COMPARISONS)
def test_the_document_has_a_place_for_it_and_its_runs_are_configured(name: str) -> None:
    text = (ROOT / comparison.DOCUMENT).read_text()
    for marker in markers(name, comparison.COMMAND):
        assert text.count(marker) == 1
    found = comparison.COMPARISONS[name]
    for entry in found.entries:
        config = load(ROOT / found.example, ["--run.method", entry.method, *found.options, *entry.options])
        if entry.method == "rlgaf" and entry.name != "rlgaf":
            assert (config.discriminator.level == "token") == ("per token" in entry.name)
            assert config.learner.absorbing_end == ("absorbing end" in entry.name)
            assert entry.name not in _as_it_is(found)


def test_an_unknown_name_is_answered_with_those_that_are() -> None:
    answer = CliRunner().invoke(comparison.app, ["run", "poems"])
    assert answer.exit_code == 2
    assert all(name in answer.output for name in comparison.COMPARISONS)
    with pytest.raises(typer.BadParameter, match="sft; rlgaf; frozen reward model; gad"):
        comparison.COMPARISONS["quickstart"].entry("ppo")


def test_no_share_of_what_sft_makes_no_better() -> None:
    def rows(base: float, best: float) -> list[dict[str, object]]:
        return [
            {
                "test": {
                    "base": {"c2st": base, "nll": 4.0, "chrf": 9.0},
                    "best": {"c2st": best, "nll": 4.1, "chrf": 9.0},
                }
            }
        ]

    found = {"sft": rows(0.9, 0.7), "rlgaf": rows(0.9, 0.8)}
    assert comparison.gap_lines(found) == {"rlgaf": "of the way from the base to sft in C2ST 50%"}
