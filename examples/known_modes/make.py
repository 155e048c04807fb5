"""Make what a known-modes run needs: `python -m examples.known_modes.make`, from the repository root.

Writes OUT/base (the policy, a Hugging Face folder), OUT/demonstrations.jsonl and OUT/facts.json (how close
the base is to its distribution). Everything follows from the options and the seed; training is repeatable on
one machine. A base that is there already is kept if it was trained with the same form and seed.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from examples.known_modes.base_model import BaseTraining, save_base, train_base, validate
from examples.known_modes.language import DISTRIBUTIONS, Sentence, text_of
from rollout.config import DataConfig
from rollout.data import SPLITS, prompt_id, split_of
from rollout.files import whole_folder, write_whole
from services.config import load

CONFIG = Path(__file__).with_name("known-modes.toml")


def write_demonstrations(
    path: Path, sizes: dict[str, int], source: Literal["expert", "base"], seed: int, data: DataConfig
) -> None:
    """Write JSON lines `{"prompt": "#17", "response": "a3 b1 c0 d2 e1 a3"}`, exactly `sizes` rows a split.

    The split of a prompt is the run's own (`data`); row numbers whose split is full are left out. The n-th
    sentence of a split depends on seed, split and n only: fewer demonstrations are the first of more, and
    the evaluation splits stay what they are.
    """
    numbers: dict[str, list[int]] = {name: [] for name in SPLITS}
    number = 0
    while any(len(numbers[name]) < sizes[name] for name in SPLITS):
        name = split_of(prompt_id(f"#{number}"), data)
        if len(numbers[name]) < sizes[name]:
            numbers[name].append(number)
        number += 1
    rows: dict[int, Sentence] = {}
    for index, name in enumerate(SPLITS):
        rng = np.random.default_rng([seed, 1, index])
        sentences = [DISTRIBUTIONS[source].sample(1, rng)[0] for _ in numbers[name]]
        rows |= dict(zip(numbers[name], sentences, strict=True))
    lines = (
        json.dumps({"prompt": f"#{number}", "response": text_of(rows[number])}) for number in sorted(rows)
    )
    write_whole(path, "".join(line + "\n" for line in lines))


def make_base(out: Path, options: BaseTraining) -> None:
    """Train the base into `out`/base and write `out`/facts.json, unless the same base is there.

    Raises:
        typer.BadParameter: another base is there.
    """
    folder, facts = out / "base", out / "facts.json"
    if folder.exists():
        trained = json.loads(facts.read_text())["training"] if facts.exists() else None
        if trained != asdict(options):
            raise typer.BadParameter(f"{folder} holds another base ({trained}); give another --out")
        typer.echo(f"{folder}: already there")
        return
    typer.echo(f"training the base: {options.steps} steps of {options.batch} sentences")
    model, loss = train_base(options, typer.echo)
    measured = {"loss": loss, **validate(model, options.form)}
    with whole_folder(folder) as partial:
        save_base(model, options.form, partial)
        write_whole(facts, json.dumps({"training": asdict(options), "measured": measured}, indent=2) + "\n")
    for name, value in measured.items():
        typer.echo(f"  {name:<18} {value:.4f}")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write")] = Path("assets/known-modes"),
    demonstrations: Annotated[int, typer.Option(min=8, help="Training demonstrations")] = 2048,
    heldout: Annotated[int, typer.Option(min=8, help="Demonstrations that judge the discriminator")] = 512,
    selection: Annotated[int, typer.Option(min=8, help="Demonstrations that choose the checkpoint")] = 1024,
    test: Annotated[int, typer.Option(min=8, help="Demonstrations of the closing table")] = 4096,
    source: Annotated[
        Literal["expert", "base"], typer.Option(help="Who writes them; base is the null control")
    ] = "expert",
    form: Annotated[
        Literal["plain", "merged"], typer.Option(help="merged: a text has two spellings in tokens")
    ] = "plain",
    split: Annotated[
        float, typer.Option(min=0, max=1, help="Form merged: share of pairs that the base spells apart")
    ] = BaseTraining.split,
    seed: Annotated[int, typer.Option(min=0, help="Seed of base and demonstrations")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the base")] = BaseTraining.steps,
) -> None:
    """Train the tiny base policy and write the demonstrations."""
    out.mkdir(parents=True, exist_ok=True)
    make_base(out, BaseTraining(form=form, split=split, seed=seed, steps=steps))
    path = out / "demonstrations.jsonl"
    sizes = dict(zip(SPLITS, (demonstrations, heldout, selection, test), strict=True))
    write_demonstrations(path, sizes, source, seed, load(CONFIG).data)
    typer.echo(f"{path}: " + ", ".join(f"{size} {name}" for name, size in sizes.items()))
    typer.echo(f"entropy of the {source}: {DISTRIBUTIONS[source].entropy():.4f} nats per sentence")


if __name__ == "__main__":
    typer.run(main)
