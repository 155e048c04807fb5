"""rlgaf's generate -> learn -> sync with a real Ray actor and a constant reward; no discriminator."""

import os
import shutil
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from benchmarks.speed.contender import Result, Timer
from benchmarks.speed.generation import worker_arguments
from benchmarks.speed.learning import learner_config
from benchmarks.speed.tables import last_token_rewards, request_table, sampling_overrides
from benchmarks.speed.workload import Workload
from learner.rank import LearnerRank
from rollout.worker import RolloutWorker
from services.ray_access import guard


class RayLoop:
    """One rollout worker as an actor, one learner rank in this process, connected."""

    worker: Any
    """Handle of the rollout worker's actor."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.folder = tempfile.mkdtemp(prefix="rlgaf-bench-")
        # Ray's workers have low priority by default, which other contenders' processes do not have.
        os.environ.setdefault("RAY_worker_niceness", "0")
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        guard(None)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=self.folder,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        arguments = worker_arguments(workload)
        actor = ray.remote(RolloutWorker).options(
            num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": str(workload.threads)}}
        )
        self.worker = actor.remote(0, **arguments)
        started = self.worker.start.remote()
        self.rank = LearnerRank(
            rank=0,
            ranks=1,
            learner=learner_config(workload),
            policy=arguments["policy"],
            rollout=arguments["rollout"],
            temperature=1.0,
            seed=0,
        )
        ray.get(started)
        joined = self.rank.connect([self.worker], [1])
        if "error" in joined:
            raise RuntimeError(joined["error"])

    def generate(self, number: int) -> pa.Table:
        """This turn's trajectories with a constant reward."""
        requests = request_table(self.workload, number)
        table = ray.get(self.worker.sample.remote(requests, sampling_overrides(self.workload)))
        lengths = [len(ids) for ids in table["response_ids"].to_pylist()]
        rewards = pa.array([last_token_rewards(n) for n in lengths], pa.list_(pa.float32()))
        return table.append_column("token_rewards", rewards)

    def sync(self, version: int) -> Result:
        """Bring the worker to `version`; the sync's own timings. Raises RuntimeError when it failed."""
        answer = self.rank.sync(version)
        if answer.pop("replace"):
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        ray.get(self.worker.shutdown.remote(), timeout=60)
        ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


class Ours:
    """A whole step without the discriminator."""

    def __init__(self, workload: Workload) -> None:
        self.loop = RayLoop(workload)

    def turn(self, number: int) -> Result:
        with Timer() as generate:
            table = self.loop.generate(number)
        with Timer() as learn:
            reference = ray.put(table)
            self.loop.rank.train_step(reference, number, 1.0)
        with Timer() as sync:
            self.loop.sync(number + 1)
        parts = {"generate_s": generate.seconds, "learn_s": learn.seconds, "sync_s": sync.seconds}
        lengths = [len(ids) for ids in table["response_ids"].to_pylist()]
        return {"seconds": sum(parts.values()), **parts, "new_tokens": int(np.sum(lengths))}

    def close(self) -> None:
        self.loop.close()
