"""`rlgaf train`: check everything that can be checked, bring the cluster up, and live the run in it."""

import asyncio
import os

from rollout.data import load_data
from rollout.engine import check_vllm_version
from rollout.templates import Renderer, load_tokenizer
from services.autoscaling import bring_up, largest
from services.config import Config, ConfigError, with_absolute_paths
from services.input_checks import check_data, check_user_functions
from services.lease import Lease
from services.methods import method_title, not_read
from services.mirror import refuse_used
from services.model_checks import check_other_models, check_policy
from services.plan import local_gpus, resource_plan
from services.ray_cluster import ray_cluster
from services.report import make_console
from services.run_folder import check_cursor, prepare_folder
from services.run_life import RunLife
from services.wandb_run import WandbRun


def run(config: Config, *, resume: bool) -> int:
    """Run or resume; returns the process's exit code.

    Raises:
        ConfigError, DataError: before anything is started or written.
    """
    console = make_console()
    console.print(f"method: {method_title(config)}", highlight=False, markup=False)
    if unread := not_read(config):
        console.print(f"not read by this method: {', '.join(unread)}", highlight=False, markup=False)
    config = with_absolute_paths(config)
    try:
        check_vllm_version()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    checkpoints = prepare_folder(config, resume)
    if config.run.mirror and not resume:
        refuse_used(config)
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
    if resume:
        check_cursor(config, splits, renderer, checkpoints)
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
            life = RunLife(config, plan, splits, renderer, checkpoints, resume, console, tracker, lease)
            code = asyncio.run(life.main())
            if tracker is not None:
                tracker.finish(code)
            return code
