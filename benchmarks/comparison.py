"""The methods beside each other on real text: `python -m benchmarks.comparison run NAME`, `... report`. See
benchmarks/README.md.

Protocol: a run is the full system, `rlgaf train` in a process of its own, one after another; it leaves one
file under `benchmarks/results/NAME`, and what has its file is not run again. A run that was cut off is
resumed. `report` rewrites, from those files alone, the parts of docs/results.md between their markers, and
the figures.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from benchmarks import store
from benchmarks.document import replace_part
from benchmarks.figures import Band, chart, over_steps
from benchmarks.grids import BRAKES
from benchmarks.lines import Column, Value, cost_line, of_test, results_table
from benchmarks.run_folder import read_run
from benchmarks.store import Result
from rollout.files import write_whole
from services.methods import Method

DOCUMENT = Path("docs/results.md")
COMMAND = "python -m benchmarks.comparison report"
Lines = dict[str, list[Result]]
"""Results by the name of their entry."""


@dataclass(frozen=True)
class Entry:
    """A line of a comparison.

    Args:
        name: its name in tables, figures and files.
        method: `run.method`, which brings the example's `[method.…]` table.
        seeds: a run each.
        options: what it has otherwise than the example, as on the command line.
    """

    name: str
    method: Method
    seeds: Sequence[int]
    options: Sequence[str] = ()

    @property
    def slug(self) -> str:
        """The name in files and folders."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Comparison:
    """An example that is run in several ways.

    Args:
        name: its name in the document, figures and folders.
        example: the runs' configuration.
        entries: the ways.
        options: what all of them have otherwise than the example.
    """

    name: str
    example: Path
    entries: Sequence[Entry]
    options: Sequence[str] = ()

    def entry(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            typer.BadParameter: there is none; it names those that are.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise typer.BadParameter(f"no entry {name!r}; there are {'; '.join(e.name for e in self.entries)}")


def _options(level: str, form: str, absorbing_end: str) -> tuple[str, ...]:
    judge = ("--discriminator.level", level, "--discriminator.reward.form", form)
    return (*judge, "--learner.absorbing_end", absorbing_end)


def _entries(alone: Sequence[int], *others: Entry) -> tuple[Entry, ...]:
    """All methods as the example has them, and `others`; three seeds of `sft` and `rlgaf`, `alone` else."""
    return (
        Entry("sft", "sft", (0, 1, 2)),
        Entry("rlgaf", "rlgaf", (0, 1, 2)),
        Entry("frozen reward model", "rlhf", alone),  # no preference pairs in these examples
        Entry("gad", "gad", alone),
        *(replace(entry, seeds=alone) for entry in others),
    )


WHOLE, PER_TOKEN, ABSORBING = (
    Entry("rlgaf, whole answers", "rlgaf", (0,), _options("sequence", "neg_log_one_minus_d", "false")),
    Entry("rlgaf, per token", "rlgaf", (0,), _options("token", "prob", "false")),
    Entry("rlgaf, per token, absorbing end", "rlgaf", (0,), _options("token", "prob", "true")),
)
HELD_BACK = tuple(word for name, value in BRAKES.items() for word in (f"--{name}", str(value)))
"""What was best with few demonstrations in the grid `few`, where it was per token."""
HELD = (
    Entry("rlgaf, per token, judge held back", "rlgaf", (0,), (*PER_TOKEN.options, *HELD_BACK)),
    Entry("rlgaf, judge held back", "rlgaf", (0,), HELD_BACK),
)
QUICKSTART, DEBIAN = (Path("examples") / f"{name}.toml" for name in ("quickstart", "debian-synopses"))
COMPARISONS = {
    item.name: item
    for item in (
        Comparison("quickstart", QUICKSTART, _entries((0, 1, 2), ABSORBING)),
        Comparison(
            "quickstart-128",
            QUICKSTART,
            (Entry("sft", "sft", (0,)), Entry("rlgaf", "rlgaf", (0,)), *HELD),
            ("--data.max_demonstrations", "128"),
        ),
        Comparison("debian-synopses", DEBIAN, _entries((0,), WHOLE, PER_TOKEN)),
    )
}
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Name = Annotated[str, typer.Argument(help=f"One of {', '.join(COMPARISONS)}")]
Results = Annotated[Path, typer.Option(help="Folder of the raw results")]
Runs = Annotated[Path, typer.Option(help="Folder of the runs themselves")]


@app.command()
def run(
    name: Name,
    only: Annotated[str, typer.Option(help="Only the entry of this name, e.g. sft")] = "",
    results: Results = store.RESULTS,
    runs: Runs = Path("runs"),
) -> None:
    """Carry out what a comparison still lacks: first one run an entry, then further seeds."""
    comparison = _comparison(name)
    if only:
        comparison = replace(comparison, entries=(comparison.entry(only),))
    for entry, seed in wanted(comparison):
        file = result_file(results, comparison, entry, seed)
        if not file.is_file():
            folder = runs / f"{name}-{entry.slug}-{seed}"
            if not (folder / "summary.json").is_file():
                _train(comparison, entry, seed, folder)
            store.write(file, read_run(folder))
            typer.echo(f"kept as {file}")


@app.command()
def keep(
    run_folder: Annotated[Path, typer.Argument(help="Finished run of `rlgaf train`")],
    name: Name,
    entry: Annotated[str, typer.Argument(help="The entry that it repeats, e.g. sft")],
    results: Results = store.RESULTS,
) -> None:
    """Take a run that was made otherwise into a comparison."""
    comparison = _comparison(name)
    result = read_run(run_folder)
    file = result_file(results, comparison, comparison.entry(entry), result["seed"])
    store.write(file, result)
    typer.echo(f"kept as {file}")


@app.command()
def report(
    results: Results = store.RESULTS,
    out: Annotated[Path, typer.Option(help="Markdown file with the markers")] = DOCUMENT,
) -> None:
    """Write tables and figures from the raw results."""
    for comparison in COMPARISONS.values():
        found = gather(comparison, results)
        if found:
            replace_part(out, comparison.name, COMMAND, section(comparison, found, out.parent / "figures"))
            typer.echo(f"{comparison.name}: {sum(map(len, found.values()))} runs")


def wanted(comparison: Comparison) -> list[tuple[Entry, int]]:
    """Every run of a comparison: the first seed of all entries before the second of any."""
    most = max(len(entry.seeds) for entry in comparison.entries)
    return [
        (entry, entry.seeds[turn])
        for turn in range(most)
        for entry in comparison.entries
        if turn < len(entry.seeds)
    ]


def result_file(results: Path, comparison: Comparison, entry: Entry, seed: int) -> Path:
    """Where a run's raw result is kept."""
    return results / comparison.name / f"{entry.slug}.seed{seed}.json"


def gather(comparison: Comparison, results: Path) -> Lines:
    """The results that are there, by entry."""
    found: Lines = {}
    for entry in comparison.entries:
        read = (store.read(result_file(results, comparison, entry, seed)) for seed in entry.seeds)
        if there := [result for result in read if result is not None]:
            found[entry.name] = there
    return found


MEASURES: tuple[Column, ...] = (
    ("C2ST", of_test("c2st"), 3),
    ("n-gram", of_test("c2st_ngram"), 3),
    ("embedding", of_test("c2st_embedding"), 3),
    ("NLL", of_test("nll"), 3),
    ("ROUGE-L", of_test("rouge_l"), 3),
    ("chrF", of_test("chrf"), 1),
    ("distinct-2", of_test("distinct_2"), 3),
    ("self-BLEU", of_test("self_bleu"), 1),
    ("MAUVE", of_test("mauve"), 2),
    ("coverage", of_test("coverage"), 3),
    ("length", of_test("length_mean"), 1),
    ("copied", of_test("copy_rate"), 3),
)
COST: tuple[Column, ...] = (
    ("chosen step", lambda result: result["best_step"], 0),
    ("of", lambda result: result["last_step"], 0),
    ("minutes", lambda result: result["seconds"]["wall"] / 60, 1),
)
PANELS = (("C2ST", "c2st"), ("NLL of human answers", "nll"), ("chrF", "chrf"), ("distinct-2", "distinct_2"))
AXES = (("minutes", "minutes"), ("samples", "answers trained on"))


def section(comparison: Comparison, found: Lines, figures: Path) -> str:
    """Tables of measures and of cost, curves, and how far each entry comes. Writes the figures."""
    everything = [result for results in found.values() for result in results]
    base, human = (_in_place(everything, row) for row in ("base", "human"))
    lines = [("base", base), *found.items(), ("human", human)]
    parts = [
        f"`python -m benchmarks.comparison run {comparison.name}`",
        results_table(lines, MEASURES),
        "\n".join(f"* {name}: {text}." for name, text in gap_lines(found).items()),
        results_table(list(found.items()), COST),
        "\n\n".join(cost_line(name, results) for name, results in found.items()),
    ]
    for axis, label in AXES:
        file = f"{comparison.name}-{axis}.svg"
        panels: dict[str, dict[str, Band]] = {
            title: {name: over_steps(results, key, "curve", axis) for name, results in found.items()}
            for title, key in PANELS
        }
        write_whole(figures / file, chart(panels, x_label=label, from_zero=False))
        parts.append(f"![learning curves over {label}](figures/{file})")
    return "\n\n".join(part for part in parts if part)


def gap_lines(found: Lines) -> dict[str, str]:
    """How much of the way from the base to `sft` each other entry goes, in the means; none without `sft`,
    nor in what `sft` makes no better."""
    if "sft" not in found:
        return {}
    said = {}
    for name, results in found.items():
        if name != "sft":
            shares = [
                f"{title} {share:.0%}"
                for title, of, better in CLOSED
                if (share := closed(results, found["sft"], of, better)) is not None
            ]
            said[name] = f"of the way from the base to sft in {', '.join(shares)}"
    return said


CLOSED: tuple[tuple[str, Value, int], ...] = (
    ("C2ST", of_test("c2st"), -1),
    ("NLL", of_test("nll"), -1),
    ("chrF", of_test("chrf"), 1),
)
"""Measures, and whether more of them is better (1) or less (-1)."""


def closed(results: Sequence[Result], best: Sequence[Result], of: Value, better: int) -> float | None:
    """Share of the difference between base and `best` that `results` make up, in the means; None where `best`
    is not better than the base."""
    base = _mean(_in_place([*results, *best], "base"), of)
    whole = _mean(best, of) - base
    return (_mean(results, of) - base) / whole if whole * better > 0 else None


def _mean(results: Sequence[Result], of: Value) -> float:
    return mean(value for result in results if (value := of(result)) is not None)


def _in_place(results: Sequence[Result], row: str) -> list[Result]:
    """Results with another row of their test prompts in the policy's place. The humans' likelihood is a
    policy's, and is left out."""
    rows = [result["test"][row] for result in results]
    if row == "human":
        rows = [{name: value for name, value in given.items() if name != "nll"} for given in rows]
    return [{**result, "test": {"best": given}} for result, given in zip(results, rows, strict=True)]


def _train(comparison: Comparison, entry: Entry, seed: int, folder: Path) -> None:
    command = [
        *(str(Path(sys.executable).with_name("rlgaf")), "train", str(comparison.example), "--auto-resume"),
        *("--run.method", entry.method, "--run.seed", str(seed)),
        *(*comparison.options, *entry.options),
        *("--run.name", folder.name, "--run.output", str(folder.parent)),
    ]
    typer.echo(f"$ {' '.join(['rlgaf', *command[1:]])}")
    code = subprocess.run(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False).returncode
    if code:
        typer.echo(f"{folder.name} ended with exit code {code}; the same command goes on")
        raise typer.Exit(code)


def _comparison(name: str) -> Comparison:
    if name not in COMPARISONS:
        raise typer.BadParameter(f"no comparison {name!r}; there are {', '.join(COMPARISONS)}")
    return COMPARISONS[name]


if __name__ == "__main__":
    app()
