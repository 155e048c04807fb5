"""The methods beside each other on real text: `python -m benchmarks.comparison run NAME`, `... report`. See
benchmarks/README.md.

Protocol: a run is the full system, `rlgaf train` in a process of its own, one after another; it leaves one
file under `benchmarks/results/NAME`, and what has its file is not run again. A run that was cut off is
resumed. `report` rewrites, from those files alone, the parts of docs/results.md between their markers, and
the figures.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, get_args

import typer

from benchmarks import store
from benchmarks.document import replace_part, write_whole
from benchmarks.figures import Band, chart, over_steps
from benchmarks.lines import Column, Value, cost_line, of_test, results_table
from benchmarks.run_folder import read_run
from benchmarks.store import Result
from services.methods import Method

DOCUMENT = Path("docs/results.md")
METHODS: tuple[Method, ...] = get_args(Method)
COMMAND = "python -m benchmarks.comparison report"


@dataclass(frozen=True)
class Comparison:
    """An example whose `[method.…]` tables are run beside each other.

    Args:
        name: of the example, and of the folder of its results.
        seeds: of every method that takes part.
    """

    name: str
    seeds: Mapping[Method, Sequence[int]]

    @property
    def example(self) -> Path:
        """The runs' configuration."""
        return Path("examples") / f"{self.name}.toml"


COMPARISONS = {
    item.name: item
    for item in (
        Comparison("quickstart", dict.fromkeys(METHODS, (0, 1, 2))),
        Comparison("debian-synopses", {"sft": (0, 1, 2), "rlgaf": (0, 1, 2), "rlhf": (0,), "gad": (0,)}),
    )
}
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Name = Annotated[str, typer.Argument(help=f"One of {', '.join(COMPARISONS)}")]
Results = Annotated[Path, typer.Option(help="Folder of the raw results")]
Runs = Annotated[Path, typer.Option(help="Folder of the runs themselves")]


@app.command()
def run(
    name: Name,
    only: Annotated[str, typer.Option(help=f"Only this method of {', '.join(METHODS)}")] = "",
    results: Results = store.RESULTS,
    runs: Runs = Path("runs"),
) -> None:
    """Carry out what a comparison still lacks: first one run a method, then further seeds."""
    for method, seed in wanted(_comparison(name)):
        file = result_file(results, name, method, seed)
        if only in ("", method) and not file.is_file():
            folder = runs / f"{name}-{method}-{seed}"
            if not (folder / "summary.json").is_file():
                _train(COMPARISONS[name], method, seed, folder)
            store.write(file, read_run(folder))
            typer.echo(f"kept as {file}")


@app.command()
def keep(
    run_folder: Annotated[Path, typer.Argument(help="Finished run of `rlgaf train`")],
    name: Name,
    results: Results = store.RESULTS,
) -> None:
    """Take a run that was made otherwise into a comparison."""
    _comparison(name)
    result = read_run(run_folder)
    file = result_file(results, name, result["config"]["run"].get("method", "rlgaf"), result["seed"])
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
        if any(found.values()):
            replace_part(out, comparison.name, COMMAND, section(comparison, found, out.parent / "figures"))
            typer.echo(f"{comparison.name}: {sum(map(len, found.values()))} runs")


def wanted(comparison: Comparison) -> list[tuple[Method, int]]:
    """Every run of a comparison: the first seed of all methods before the second of any."""
    most = max(map(len, comparison.seeds.values()))
    return [
        (method, seeds[turn])
        for turn in range(most)
        for method, seeds in comparison.seeds.items()
        if turn < len(seeds)
    ]


def result_file(results: Path, name: str, method: str, seed: int) -> Path:
    """Where a run's raw result is kept."""
    return results / name / f"{method}.seed{seed}.json"


def gather(comparison: Comparison, results: Path) -> dict[Method, list[Result]]:
    """The results that are there, by method."""
    found: dict[Method, list[Result]] = {}
    for method, seeds in comparison.seeds.items():
        read = (store.read(result_file(results, comparison.name, method, seed)) for seed in seeds)
        found[method] = [result for result in read if result is not None]
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


def section(comparison: Comparison, found: Mapping[Method, Sequence[Result]], figures: Path) -> str:
    """Tables of measures and of cost, curves, and how far each method comes. Writes the figures."""
    everything = [result for results in found.values() for result in results]
    trained = {results[0]["method"]: results for results in found.values() if results}
    base, human = (_in_place(everything, row) for row in ("base", "human"))
    lines = [("base", base), *trained.items(), ("human", human)]
    parts = [
        f"`python -m benchmarks.comparison run {comparison.name}`",
        results_table(lines, MEASURES),
        "\n".join(f"* {name}: {text}." for name, text in gap_lines(found).items()),
        results_table(list(trained.items()), COST),
        "\n\n".join(cost_line(name, results) for name, results in trained.items()),
    ]
    for axis, label in AXES:
        file = f"{comparison.name}-{axis}.svg"
        panels: dict[str, dict[str, Band]] = {
            title: {name: over_steps(results, key, "curve", axis) for name, results in trained.items()}
            for title, key in PANELS
        }
        write_whole(figures / file, chart(panels, x_label=label, from_zero=False))
        parts.append(f"![learning curves over {label}](figures/{file})")
    return "\n\n".join(part for part in parts if part)


def gap_lines(found: Mapping[Method, Sequence[Result]]) -> dict[str, str]:
    """How much of the way from the base to `sft` each other method goes, in the means; none without `sft`."""
    if not found.get("sft"):
        return {}
    said = {}
    for method, results in found.items():
        if method != "sft" and results:
            shares = [f"{title} {closed(results, found['sft'], of):.0%}" for title, of in CLOSED]
            said[results[0]["method"]] = f"of the way from the base to sft in {', '.join(shares)}"
    return said


CLOSED: tuple[tuple[str, Value], ...] = (
    ("C2ST", of_test("c2st")),
    ("NLL", of_test("nll")),
    ("chrF", of_test("chrf")),
)


def closed(results: Sequence[Result], best: Sequence[Result], of: Value) -> float:
    """Share of the difference between base and `best` that `results` make up, in the means; NaN where there
    is no difference."""
    base = _mean(_in_place([*results, *best], "base"), of)
    whole = _mean(best, of) - base
    return (_mean(results, of) - base) / whole if whole else float("nan")


def _mean(results: Sequence[Result], of: Value) -> float:
    return mean(value for result in results if (value := of(result)) is not None)


def _in_place(results: Sequence[Result], row: str) -> list[Result]:
    """Results with another row of their test prompts in the policy's place. The humans' likelihood is a
    policy's, and is left out."""
    rows = [result["test"][row] for result in results]
    if row == "human":
        rows = [{name: value for name, value in given.items() if name != "nll"} for given in rows]
    return [{**result, "test": {"best": given}} for result, given in zip(results, rows, strict=True)]


def _train(comparison: Comparison, method: Method, seed: int, folder: Path) -> None:
    command = [
        *(str(Path(sys.executable).with_name("rlgaf")), "train", str(comparison.example), "--auto-resume"),
        *("--run.method", method, "--run.seed", str(seed)),
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
