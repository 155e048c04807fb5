"""Tables and figures from raw results; what is written by hand stays."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import store
from benchmarks.document import markers
from benchmarks.figures import by_number, chart, over_steps
from benchmarks.known_modes import planning
from benchmarks.known_modes.cells import Cell, Grid
from benchmarks.known_modes.reporting import COMMAND, PART, write_report
from benchmarks.known_modes.tables import (
    MEASURES,
    alarm_lead,
    alarm_line,
    alarm_step,
    alarm_table,
    copy_ratio,
    first_gone,
    lost_step,
)
from benchmarks.lines import results_table, spread

ROOT = Path(__file__).parents[2]


def result(tv: float, **more: object) -> dict:
    row = {
        "c2st": 0.5 + tv,
        "mode_tv": tv,
        "modes_kept": 8.0,
        "nll_gap": 0.1,
        "valid": 1.0,
        "sentence_copy_rate": 0.3,
        "natural_copy_rate": 0.25,
    }
    steps = [{"step": s, "mode_tv": tv + s / 10, "gone": g} for s, g in ((1, 0), (2, 1), (3, 0), (4, 2))]
    return {
        "test": {"best": row, "last": {**row, "mode_tv": 2 * tv}},
        "best_step": 3,
        "steps": steps,
        "curve": [],
        "alarms": [{"step": 9, "name": "mode_collapse"}, {"step": 2, "name": "copying"}],
        "seconds": {"wall": 10.0},
        "tokens": {"rollout_tokens": 1_500_000},
        **more,
    }


def test_spread_is_mean_and_range() -> None:
    assert spread([0.1, 0.2, 0.6], 2) == "0.30 (0.10 to 0.60)"
    assert spread([0.25], 2) == "0.25"
    assert spread([8, 8, 8], 0) == "8"
    assert spread([7, 8, 8], 0) == "7.7 (7 to 8)"
    assert spread([None, 4.0, 2.0], 0) == "3.0 (2 to 4) [2 of 3]"
    assert spread([None], 2) == "-"


def test_lines_of_a_table() -> None:
    table = results_table([("one", [result(0.1), result(0.3)]), ("none", [])], MEASURES)
    head, _, line = table.splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["C2ST"] == "0.700 (0.600 to 0.800)"
    assert cells["runs"] == "2"
    assert cells["mode TV, last step |"] == "0.400 (0.200 to 0.600) |"
    assert copy_ratio(result(0.1)) == pytest.approx(1.2)
    assert copy_ratio({"failed": "gradient"}) is None


def test_when_modes_are_lost_for_good_and_when_the_alarm_came() -> None:
    assert lost_step(result(0.1)) == 4  # the mode gone at step 2 came back
    assert lost_step(result(0.1, steps=[{"step": 1, "gone": 0}])) is None
    assert spread([lost_step(result(0.1, steps=[{"step": 1}]))], 0) == "not recorded"
    assert alarm_step("mode_collapse")(result(0.1)) == 9
    assert alarm_step("cycling")(result(0.1)) is None
    early = result(0.1, alarms=[{"step": 9, "name": "mode_collapse"}, {"step": 1, "name": "overconfidence"}])
    assert (alarm_lead(early), alarm_lead(result(0.1))) == (3, -5)
    assert alarm_lead(result(0.1, alarms=[])) is None
    kept = result(0.1, steps=[{"step": 1, "gone": 0}])
    said = alarm_line([early, result(0.1), result(0.1, alarms=[]), kept])
    assert said.startswith("3 runs lost")
    assert said.endswith("before that in 1, at the same step in 0, later in 1, and never in 1.")
    assert alarm_line([kept]) == ""
    assert alarm_lead(result(0.1, steps=[{"step": 1, "gone": 0}])) is None


def test_each_alarm_has_its_hits_and_its_false_calls() -> None:
    def run(gone: list[int], **alarms: int) -> dict:
        steps = [{"step": 5 * i + 10, "gone": n} for i, n in enumerate(gone)]
        return {"steps": steps, "alarms": [{"name": name, "step": step} for name, step in alarms.items()]}

    assert (first_gone(run([0, 1, 0])), first_gone(run([0]))) == (15, None)
    assert first_gone({"steps": [{"step": 1, "gone": 3}]}) is None  # one batch is too few to tell
    lost, back, whole = [0, 0, 1], [0, 1, 0], [0, 0, 0]
    runs = [run(lost, early=10), run(lost, early=20), run(lost, early=25), run(lost)]
    runs += [run(back, early=10), run(back), run(whole, early=10), run(whole), run(whole)]
    row = alarm_table(runs, ["early"]).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["early", *"1111", "0", "1", "1"]
    head = alarm_table(runs, ["early"]).splitlines()[0]
    assert all(said in head for said in ("of 4", "while, of 2", "gone, of 3"))
    assert alarm_table([], ["early"]) == ""


def test_figures_hold_the_range_of_the_seeds() -> None:
    assert over_steps([result(0.1), result(0.3)], "mode_tv")[1] == pytest.approx((2, 0.3, 0.4, 0.5))
    over_time = [
        result(tv, steps=[{"step": 1, "mode_tv": tv, "minutes": m}]) for tv, m in ((0.1, 2), (0.3, 4))
    ]
    assert over_steps(over_time, "mode_tv", x="minutes") == [pytest.approx((3, 0.1, 0.2, 0.3))]
    shorter = result(0.2, steps=[{"step": 1, "mode_tv": 0.0}])
    assert [point[0] for point in over_steps([result(0.1), shorter], "mode_tv")] == [1]
    one, two = (result(0.1, method="sft", demonstrations=n) for n in (32, 128))
    assert by_number([two, one], copy_ratio)["sft"][0] == pytest.approx((5.0, 1.2, 1.2, 1.2))
    lines = {"a": over_steps([result(0.1)], "mode_tv"), "b": over_steps([result(0.3)], "mode_tv"), "c": []}
    drawn = ElementTree.fromstring(chart({"first <": lines, "second": lines}))
    assert len(drawn.findall("{*}polyline")) == 4
    assert ">0.11</text>" not in chart({"first": lines})  # the y axis begins at zero
    assert ">0.20</text>" in chart({"first": lines}, from_zero=False)
    with pytest.raises(ValueError, match="nothing to draw"):
        chart({"empty": {"a": []}})


def test_the_report_replaces_its_own_part_only(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    grid = Grid("default", "Does it?", (Cell("ref", kind="reference"), Cell("rlgaf")), seeds=(0, 1))
    out, results = tmp_path / "docs" / "results.md", tmp_path / "raw"
    out.parent.mkdir()
    begin, end = markers(PART, COMMAND)
    out.write_text(f"# By hand\n{begin}\nold\n{end}\nalso by hand\n")
    assert write_report([grid], assets, results, out) == ["no results yet"]
    facts = planning.bases(grid, assets)
    for task, tv in zip(planning.finals(grid, facts, results), (0.1, 0.3), strict=False):
        store.write(results / task.file(facts["known-modes"]), result(tv))
    reference = planning.finals(grid, facts, results)[0]
    both = {"test": {"base": result(0.7)["test"]["best"], "human": result(0.0)["test"]["best"]}}
    store.write(results / reference.file(facts["known-modes"]), both)
    for _ in range(2):
        write_report([grid], assets, results, out)
    text = out.read_text()
    assert text.startswith("# By hand\n")
    assert text.endswith(f"{end}\nalso by hand\n")
    assert "old" not in text
    assert text.count("### default: Does it?") == 1
    assert "| fresh demonstrations | 1 | 0.500 |" in text
    assert (tmp_path / "docs" / "figures" / "default.svg").is_file()
    out.write_text("nothing")
    with pytest.raises(ValueError, match="needs, once"):
        write_report([grid], assets, results, out)
