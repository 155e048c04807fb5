"""Display, closing table, summary and report."""

import io
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.text import Text

from rollout.printable import printable
from services.display import Display, clock_time, step_line
from services.evaluation.evaluate import KEYS
from services.report import (
    line_chart,
    markdown_table,
    phase_rows,
    print_report,
    sample_rows,
    sample_table,
    verdict,
    write_report,
    write_samples,
    write_summary,
)
from services.watching.alarms import Alarm


def row(c2st: float, half: float = 0.03) -> dict[str, float]:
    values = {key: 1.0 for key in KEYS}
    return {**values, "c2st": c2st, "c2st_low": c2st - half, "c2st_high": c2st + half, "coverage": 1 - c2st}


EVALUATION = {"base": row(0.9), "best": row(0.6), "last": row(0.65), "human": row(0.52, 0.06)}
PHASES = {"generate": {"seconds": 30.0, "tokens": 6000}, "sync": {"seconds": 10.0, "tokens": 0}}
SAMPLES = [{"prompt": "a | b\nc", "human": "<b>x</b>", "model": "[red]y[/red]"}]


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=terminal)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_verdict_reads_the_intervals() -> None:
    assert verdict(EVALUATION).startswith("It worked: C2ST 0.900 → 0.600 (human floor 0.520)")
    assert "within" not in verdict(EVALUATION)
    assert "within the floor's interval" in verdict({**EVALUATION, "best": row(0.56)})
    assert verdict({**EVALUATION, "best": row(0.86)}).startswith("No clear change")
    assert verdict({**EVALUATION, "best": row(0.99, 0.01)}).startswith("It got worse")


def test_summary_is_complete_strict_and_whole(tmp_path: Path) -> None:
    evaluation = {**EVALUATION, "last": {**EVALUATION["last"], "nll": math.nan}}
    path = write_summary(tmp_path, evaluation, PHASES, [Alarm(3, "reward_flat", "flat")], {"steps": 7})
    summary = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert all(
        key in summary["evaluation"][name] for name in ("base", "best", "last", "human") for key in KEYS
    )
    assert summary["evaluation"]["last"]["nll"] is None
    assert summary["phases"]["generate"] == {"seconds": 30.0, "tokens": 6000}
    assert summary["alarms"] == [{"step": 3, "name": "reward_flat", "message": "flat"}]
    assert summary["steps"] == 7
    assert list(tmp_path.iterdir()) == [path]
    broken = {**EVALUATION, "best": {key: 1.0 for key in KEYS if key != "chrf"}}
    with pytest.raises(ValueError, match=r"evaluation\.best\.chrf"):
        write_summary(tmp_path, broken, PHASES, [])
    with pytest.raises(ValueError, match="alarms"):
        write_summary(tmp_path, EVALUATION, PHASES, [], {"alarms": 1})


def test_report_in_markdown_and_svg(tmp_path: Path) -> None:
    curve = [(0, row(0.9)), (20, row(0.7)), (40, row(0.6))]
    text = write_report(tmp_path, "run", EVALUATION, PHASES, [], curve, SAMPLES).read_text()
    assert "| human (floor) | 0.520 [0.46, 0.58] | ≤ 1.000 |" in text
    assert "| a \\| b c | &lt;b&gt;x&lt;/b&gt; | [red]y[/red] |" in text
    assert "| generate | 30.0 | 75% | 6,000 | 200 |" in text
    svg = ET.parse(tmp_path / "learning_curve.svg").getroot()
    lines = svg.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 3]
    assert "Learning curve" not in write_report(tmp_path, "run", EVALUATION, PHASES, [], []).read_text()


def test_chart_places_points() -> None:
    root = ET.fromstring(line_chart({"a": [(0, 0.0), (10, 1.0), (20, 5.0)]}, "t", "x", width=250, height=172))
    points = root.find("{http://www.w3.org/2000/svg}polyline")
    assert points is not None
    assert points.attrib["points"] == "40.0,136.0 90.0,36.0 140.0,36.0"


def test_cells() -> None:
    assert phase_rows(PHASES, wall=60.0) == [
        ["generate", "30.0", "50%", "6,000", "200"],
        ["sync", "10.0", "17%", "", ""],
    ]
    assert sample_rows([{"prompt": "a\nb", "human": "x" * 50, "model": ""}], width=10) == [
        ["a b", "xxxx … xxxx", ""]
    ]
    four = {"model": "m", "base": "b", "human": "h", "prompt": "p", "other": "o"}
    assert sample_rows([four]) == [["p", "h", "b", "m"]]
    assert markdown_table(("h",), [["1"]]) == "| h |\n| --- |\n| 1 |"
    assert [clock_time(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_printed_report_keeps_markup_literal() -> None:
    target = console()
    print_report(target, EVALUATION, PHASES, [Alarm(3, "reward_flat", "flat")], SAMPLES)
    text = printed(target)
    assert "[red]y[/red]" in text
    assert "alarm at step 3: reward_flat: flat" in text
    assert "0.600 [0.57, 0.63]" in text
    assert text.rstrip().splitlines()[-1].startswith("It worked")


def test_samples_round_trip(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 20, ["p", "q"], ["h", "i"], ["m", ""])
    assert path.name == "step-000020.parquet"
    assert pq.read_table(path).to_pylist()[1] == {"step": 20, "prompt": "q", "human": "i", "model": ""}


def test_plain_display_prints_one_line_per_step() -> None:
    now = [0.0]
    target = console()
    with Display(10, console=target, clock=lambda: now[0]) as display:
        display.phase("loading policy")
        display.phase("loading policy")
        assert display.left() is None
        for step in (1, 2):
            display.phase("generate")
            now[0] += 3
            display.step(step, {"reward/mean": 0.25, "policy/kl": None})
        assert display.left() == 24
    assert printed(target).splitlines() == [
        "loading policy",
        "generate",
        "step 1/10  reward 0.25  3.0 s/step  left 0:27",
        "step 2/10  reward 0.25  3.0 s/step  left 0:24",
    ]
    assert step_line(1, 2, {}, 1.0, None) == "step 1/2  1.0 s/step"


def test_terminal_display_draws_a_panel() -> None:
    target = console(terminal=True)
    with Display(10, console=target) as display:
        display.phase("generate")
        display.step(1, {"reward/mean": 0.25})
        display.note("[b] stays")
    text = printed(target)
    assert "step 1/10" in text
    assert "[b] stays" in text


def test_the_panels_numbers_stand_under_their_labels() -> None:
    target = console(terminal=True)
    display = Display(10, console=target)
    display.step(3, {"reward/mean": 0.25, "policy/kl": 0.02, "evaluation/c2st": 0.9})
    target.print(display._panel())
    head, bar, labels, numbers = (
        line.strip("│ ") for line in Text.from_ansi(printed(target)).plain.splitlines()[1:5]
    )
    assert head.startswith("step 3/10")
    assert set(bar) <= set("━╸╺ ")
    assert labels.split() == ["reward", "KL", "C2ST"]
    assert numbers.split() == ["0.25", "0.02", "0.9"]


HOSTILE = "\x1b[2J\x9b31m\u202egpj.exe\u2066\x07"


def test_no_text_of_a_model_acts_on_terminal_or_page(tmp_path: Path) -> None:
    target = console(terminal=True)
    with Display(10, console=target) as display:
        display.note(f"model: {HOSTILE}")
    target.print(sample_table([{"prompt": HOSTILE, "human": "h", "model": HOSTILE}]))
    shown = markdown_table(("prompt", "model"), sample_rows([{"prompt": HOSTILE, "model": HOSTILE}]))
    for text in (printed(target), shown):
        assert "\\u202egpj.exe" in text or "\\\\u202egpj.exe" in text
        assert not {"\x9b", "\u202e", "\u2066", "\x07"} & set(text)
    assert "\x1b[2J" not in printed(target)
    answer = {"response": HOSTILE}
    assert json.loads(printable(json.dumps(answer, ensure_ascii=False))) == answer
