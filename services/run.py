"""`rlgaf train`: check everything that can be checked, bring the cluster up, and live the run in it."""

import asyncio
import os
from datetime import date
from functools import partial
from pathlib import Path

from rollout.data import load_data
from rollout.engine import check_vllm_version
from rollout.templates import Renderer, load_tokenizer
from services.autoscaling import bring_up, largest
from services.checkpoint import CONFIG
from services.config import Config, ConfigError, given, with_absolute_paths
from services.input_checks import check_data, check_user_functions
from services.jobs.resumption import find_checkpoint, wait_for_an_earlier_driver
from services.lease import Lease
from services.methods import method_title, not_read
from services.mirror import check_mirror
from services.model_checks import check_other_models, check_policy
from services.plan import local_gpus, resource_plan
from services.ray_cluster import ray_cluster
from services.report import make_console
from services.run_folder import check_data_of, check_folder, check_resume
from services.run_life import RunLife
from services.wandb_run import WandbRun


def with_day(config: Config, file: Path | None) -> Config:
    """The same configuration with the date that a chat template may read: today, or the day on which the run
    began, which a checkpoint's own `file` has: a run that is resumed has the prompts it had.
    """
    if config.data.prompt_format != "chat":
        return config
    own = given(file).get("data", {}).get("today") if file is not None and file.is_file() else None
    day = own if isinstance(own, date) else config.data.today or date.today()
    return config.model_copy(update={"data": config.data.model_copy(update={"today": day})})


def run(config: Config, *, resume: bool, auto: bool = False, from_step: int | None = None) -> int:
    """Run or resume (from the checkpoint of `from_step`); returns the process's exit code. `auto`: resume
    where there is a checkpoint, else begin.

    Raises:
        ConfigError, DataError: before anything is started or written.
    """
    console = make_console()
    console.print(f"method: {method_title(config)}", highlight=False, markup=False)
    if unread := not_read(config):
        console.print(f"not read by this method: {', '.join(unread)}", highlight=False, markup=False)
    config = with_absolute_paths(config)
    own_day = config.data.today is None
    config = with_day(config, None)
    try:
        check_vllm_version()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    if auto:
        wait_for_an_earlier_driver(config, console.print)
    check_folder(config, resume=resume, auto=auto)
    plan = resource_plan(config, gpus=local_gpus())
    cluster = os.environ.get("RAY_ADDRESS")
    if not cluster:
        plan.check(float(os.cpu_count() or 1), local_gpus(), "this machine")
    tokenizer = load_tokenizer(config.policy)
    check_policy(config, tokenizer)
    renderer = Renderer(tokenizer, config.data, config.policy)
    check_other_models(config)
    check_user_functions(config)
    splits = load_data(config.data, renderer)
    check_data(config, splits)
    say = partial(console.print, highlight=False, markup=False)
    found = find_checkpoint(config, auto=auto, step=from_step, say=say) if resume else None
    if found is not None:
        if (
            own_day and (dated := with_day(config, found.folder / CONFIG)) != config
        ):  # it came from the mirror
            config, renderer = dated, Renderer(tokenizer, dated.data, dated.policy)
            splits = load_data(config.data, renderer)
        config = check_resume(config, found, say)
        check_data_of(config, splits, renderer, found)
    if config.run.mirror:
        check_mirror(config, new=found is None)
    for report in splits.reports:
        console.print(f"data: {report.summary()}", markup=False)
    console.print(
        f"splits: {splits.train.num_rows} train, {splits.heldout.num_rows} held out for the discriminator, "
        f"{splits.selection.num_rows} selection, {splits.test.num_rows} test"
    )
    if config.data.preferences:
        console.print(
            f"preference pairs: {splits.preferences.num_rows} to train on, "
            f"{splits.heldout_preferences.num_rows} held out"
        )
    limit = largest() if cluster else None
    with ray_cluster(cluster) as (cpus, gpus):
        plan = resource_plan(config, gpus=limit.gpus if limit else gpus)
        if limit is not None:
            bring_up(plan, limit, console.print)
        else:
            plan.check(cpus, gpus, "the Ray cluster")
        config = plan.settle(config)
        for line in plan.lines():
            console.print(f"plan: {line}", highlight=False, markup=False)
        with Lease(config.folder) as lease:
            tracker = WandbRun(config) if config.run.wandb else None
            if tracker is not None:
                console.print(f"Weights & Biases: {tracker.address}", highlight=False, markup=False)
            life = RunLife(config, plan, splits, renderer, found, console, tracker, lease)
            code = asyncio.run(life.main())
            if tracker is not None:
                tracker.finish(code)
            return code
