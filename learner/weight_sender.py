"""Sending side of a weight sync: the learner's weights to every rollout worker, in one call, exact and loud.

`WeightSender` exists on every learner rank, and every rank calls `connect` and `send`: under ZeRO-3 all of
them gather. Rank 0 alone talks to the workers and to the wire. Under ZeRO-3, run one forward before the
first `send`.

    source = ModuleWeights(engine.module, dtype=torch.bfloat16)
    sender = WeightSender(source, workers, backend="gloo", rank=rank, world_size=world, deadline_s=120)
    sender.connect()
    timings = sender.send(version)

On WeightSyncError, restart the workers in `error.broken`, then connect(new_workers) and send again.

`connect` first asks every worker for a sign of life; a sync goes pause -> start -> (update | broadcast) ->
finish(version) -> resume. All workers must answer the pause before the first one starts, so a worker that
died between syncs costs only itself. What has begun and did not end is broken.
"""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

import ray.util
import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from learner.weight_client import MIN_WAIT_S, WeightSyncError, WorkerClient, WorkerRef, rank_offsets
from learner.weight_source import MIB, ModuleWeights
from rollout.wire import Entry, GlooGroup, pack, plan_buckets

__all__ = ["ModuleWeights", "WeightSender", "WeightSyncError", "WorkerClient", "WorkerRef", "rank_offsets"]

T = TypeVar("T")


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Trainer side of the `gloo` backend; `world_size` counts the sender and all engine ranks."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class CheckedNCCLTrainerInitInfo(NCCLTrainerInitInfo):
    """vLLM's packed NCCL sender, whose receivers verify the checksums that ModuleWeights puts on the wire."""

    backend: ClassVar[str] = "rlgaf_nccl"


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Rank 0 of the gloo group; on other learner ranks it only drives the source's gathers."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(self, *, client: VLLMWeightSyncClient, source: WeightSource, is_sender: bool) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self.wire_s = 0.0
        self._group: GlooGroup | None = None
        self._bucket_bytes = 0

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Open a store on a free port and meet the workers there, or raise at the deadline."""
        if source is None:
            raise ValueError("the gloo weight transfer needs a WeightSource")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine._bucket_bytes = init_info.bucket_bytes
        if not engine.is_sender:
            return engine
        store = GlooGroup.store(init_info.master_address, init_info.timeout_s)
        worker_info: dict[str, Any] = {
            "master_address": init_info.master_address,
            "master_port": store.port,
            "world_size": init_info.world_size,
            "bucket_bytes": init_info.bucket_bytes,
            "timeout_s": init_info.timeout_s,
        }
        assert isinstance(client, WorkerClient)
        joined = _background(client.init_weight_transfer_engine, worker_info)
        try:
            if GlooGroup.meet(store, init_info.world_size, client.remaining(), lambda: bool(client.failures)):
                engine._group = GlooGroup(store, 0, init_info.world_size, client.remaining())
        finally:
            joined.result()  # the workers' reasons matter more than what rank 0 saw of them
        if engine._group is None:
            raise WeightSyncError("the weight-transfer group did not come together in time")
        return engine

    def send_weights(self) -> None:
        """Broadcast the source. The pass is finished even when the wire breaks, or other ranks hang in its
        gathers.
        """
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        metas = self.source.metadata()
        entries = [Entry(meta.name, meta.dtype, meta.shape) for meta in metas]
        update_info = {
            "names": [meta.name for meta in metas],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metas],
            "shapes": [list(meta.shape) for meta in metas],
        }
        self.client.start_weight_update()
        updated = _background(self.client.update_weights, update_info)
        broken = self._broadcast(entries)
        updated.result()
        if broken is not None:
            raise WeightSyncError(f"the weight wire broke: {broken}") from broken
        self.client.finish_weight_update()

    def _broadcast(self, entries: list[Entry]) -> RuntimeError | None:
        assert self.source is not None
        assert self._group is not None
        self.wire_s = 0.0
        pairs = iter(self.source)
        try:
            for bucket in plan_buckets(entries, self._bucket_bytes):
                buffer = pack(bucket, entries, pairs)
                started = time.perf_counter()
                self._group.broadcast(buffer).wait()
                self.wire_s += time.perf_counter() - started
        except RuntimeError as error:
            self.shutdown()  # the workers that still listen get an error instead of waiting for the deadline
            for _ in pairs:
                pass
            return error
        for name, _ in pairs:
            raise WeightSyncError(f"the weight source yielded {name} beyond its metadata")
        return None

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class CheckedNCCLTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """vLLM's sender with the time of its broadcasts, and a deadline: NCCL itself would wait for ever."""

    wire_s = 0.0

    @classmethod
    def trainer_init(
        cls,
        init_info: NCCLTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """vLLM's, given up at the first failure of a worker or at the deadline.

        vLLM waits 300 s in its store and without end in NCCL's own start, and offers no setting for either,
        so the attempt goes on in a daemon thread that nobody waits for. Workers that were part of it are
        held up as long and count as failed.
        """
        if not init_info.is_sender:
            return super().trainer_init(init_info, client=client, source=source)
        assert isinstance(client, WorkerClient)
        device = torch.cuda.current_device()

        def join() -> Any:
            torch.cuda.set_device(device)  # the current device belongs to the thread
            return super(CheckedNCCLTrainerWeightTransferEngine, cls).trainer_init(
                init_info, client=client, source=source
            )

        attempt = _background(join)
        seconds = client.remaining()
        while not wait([attempt], timeout=0.1).done and not client.failures:
            if client.remaining() <= MIN_WAIT_S:
                raise WeightSyncError(f"the NCCL group did not come together within {seconds:.0f} s")
        if not attempt.done():
            reasons = "; ".join(f"rollout worker {i}: {why}" for i, why in sorted(client.failures.items()))
            raise WeightSyncError(f"the NCCL group did not come together: {reasons}")
        engine: Self = attempt.result()
        return engine

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        assert isinstance(source, ModuleWeights)
        if not self.is_sender:
            super()._broadcast(source, meta)
            return
        assert isinstance(self.client, WorkerClient)
        seconds = self.client.remaining()
        # Aborting the communicator ends the kernels that wait for a peer.
        watch = threading.Timer(seconds, self.shutdown)
        watch.start()
        started = time.perf_counter()
        try:
            super()._broadcast(source, meta)
            torch.cuda.current_stream().synchronize()
        finally:
            watch.cancel()
        if self.model_update_group is None:
            raise WeightSyncError(f"the NCCL broadcast did not end within {seconds:.0f} s")
        self.wire_s = time.perf_counter() - started - source.gather_s - source.checksum_s


TrainerEngine = GlooTrainerWeightTransferEngine | CheckedNCCLTrainerWeightTransferEngine

for _engine in (GlooTrainerWeightTransferEngine, CheckedNCCLTrainerWeightTransferEngine):
    _backend = "gloo" if _engine is GlooTrainerWeightTransferEngine else "rlgaf_nccl"
    if _backend not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(_backend, _engine)


class WeightSender:
    """One learner rank's part in every sync. See the module docstring for use.

    backend: `rollout.engine.transfer_backend(device)`. rank, world_size: of the learner's torch.distributed
    default group, which carries rank 0's verdict to the others: all ranks return, or all raise the same
    WeightSyncError. deadline_s: of one connect or send; what follows a failure (letting healthy workers go
    on) may add RELEASE_S. address: of rank 0's node as workers reach it (None: Ray's node address).
    """

    def __init__(
        self,
        source: ModuleWeights,
        workers: Sequence[WorkerRef],
        *,
        backend: Literal["gloo", "rlgaf_nccl"],
        rank: int,
        world_size: int,
        deadline_s: float,
        bucket_bytes: int = 64 * MIB,
        address: str | None = None,
    ) -> None:
        self._source = source
        self._workers = tuple(workers)
        self._backend = backend
        self._rank = rank
        self._world_size = world_size
        self._deadline_s = deadline_s
        self._bucket_bytes = bucket_bytes
        self._address = address
        self._client = WorkerClient(self._workers, deadline_s)
        self._engine: TrainerEngine | None = None
        source.sends = rank == 0

    def connect(self, workers: Sequence[WorkerRef] | None = None) -> None:
        """Form the transfer group with the workers; called on every rank.

        Does nothing when connected, unless `workers` (the fleet after a restart) is given: then, and after
        a failed send, a new group on a new port takes the old one's place.
        """
        if workers is None and self._engine is not None:
            return
        self.close()
        self._workers = self._workers if workers is None else tuple(workers)
        self._client = WorkerClient(self._workers, self._deadline_s)
        error: WeightSyncError | None = None
        try:
            if self._rank == 0:
                self._client.ping()
            engine = WeightTransferTrainerFactory.trainer_init(
                self._init_info(), client=self._client, source=self._source
            )
            self._engine = cast(TrainerEngine, engine)
        except (RuntimeError, OSError) as failure:  # whatever it is, the other ranks wait for the verdict
            error = self._verdict("connecting to the rollout workers", failure)
        self._agree(error)

    def send(self, version: int) -> dict[str, float]:
        """Bring all workers to `version`; called on every rank at the same point of the step.

        Returns rank 0's seconds on every rank: gather_s, checksum_s, wire_s and total_s of the sender,
        worker_wire_s, worker_checksum_s, worker_load_s, worker_finalize_s of the slowest worker,
        worker_memory_mib of the largest, and bytes.
        Raises WeightSyncError on every rank; `connect` before the next send.
        """
        if self._engine is None:
            raise WeightSyncError("not connected: call connect() first")
        started = time.perf_counter()
        self._client.reset(version)
        error: WeightSyncError | None = None
        try:
            if self._rank == 0:
                self._client.start_weight_update()
        except WeightSyncError as failure:
            error = self._verdict(f"weight sync to version {version}", failure)
        self._agree(error)  # before the gathers: a rank that waits in one alone waits for ever
        timings: dict[str, float] = {}
        try:
            self._engine.send_weights()
            if self._rank == 0:
                timings = self._timings(started)
        except (RuntimeError, OSError) as failure:
            error = self._verdict(f"weight sync to version {version}", failure)
        return self._agree(error, timings)

    def close(self) -> None:
        """Leave the transfer group."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def _init_info(self) -> TrainerInitInfo:
        address = self._address or ray.util.get_node_ip_address()
        size = 1 + sum(worker.world for worker in self._workers)
        if self._backend == "gloo":
            return GlooTrainerInitInfo(address, size, self._bucket_bytes, self._deadline_s, rank=self._rank)
        return CheckedNCCLTrainerInitInfo(
            address, _free_port(address), size, packed_buffer_size_bytes=self._bucket_bytes, rank=self._rank
        )

    def _timings(self, started: float) -> dict[str, float]:
        assert self._engine is not None
        own = {
            "gather_s": self._source.gather_s,
            "checksum_s": self._source.checksum_s,
            "wire_s": self._engine.wire_s,
            "bytes": float(sum(Entry(m.name, m.dtype, m.shape).nbytes for m in self._source.metadata())),
        }
        theirs = {f"worker_{key}": value for key, value in self._client.timings().items()}
        return own | theirs | {"total_s": time.perf_counter() - started}

    def _verdict(self, what: str, failure: Exception) -> WeightSyncError:
        """Let the healthy workers go on, and say who failed, why, and who must be restarted."""
        self._client.release()
        broken = self._client.broken()
        restart = f" (to be restarted: workers {broken})" if broken else ""
        return WeightSyncError(f"{what}: {failure}{restart}", self._client.failures, broken)

    def _agree(
        self, error: WeightSyncError | None, value: dict[str, float] | None = None
    ) -> dict[str, float]:
        """Rank 0's outcome on every rank: its value, or its error raised."""
        box: list[Any] = [(error, value or {})]
        if self._world_size > 1:
            dist.broadcast_object_list(box, src=0)
        verdict, answer = box[0]
        if verdict is not None:
            self.close()
            raise verdict
        return answer


def _background(work: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Run in a daemon thread: one that hangs must not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rlgaf-weights").start()
    return future


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
