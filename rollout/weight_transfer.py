"""Receiving side of a weight sync: vLLM weight-transfer engines that verify every tensor before loading it.

`gloo` (ours, CPU) and `rlgaf_nccl` (vLLM's packed NCCL engine with a checking loader) share one life cycle,
because CPU vLLM repacks weights and quantised layers process theirs after loading: `start_weight_update`
restores the layers' load-time form, `update_weights` receives, checks and loads, `finish_weight_update`
processes what is left.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rollout.wire import CheckedLoader, Entry, GlooGroup, WireError, receive


@dataclass
class SyncTimings:
    """Seconds of the last sync on the receiver: `wire_s` waiting for bytes, `checksum_s`, `load_s` in
    load_weights (it repacks each completed layer), `finalize_s` for the layers left over."""

    wire_s: float = 0.0
    checksum_s: float = 0.0
    load_s: float = 0.0
    finalize_s: float = 0.0


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the group meets, and the place of this engine's first rank in it."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one update in wire order, checksum tensors included."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def entries(self) -> list[Entry]:
        """Raises ValueError when the lists differ in length."""
        return [
            Entry(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


def _receiver_name(vllm_config: Any) -> str:
    """What messages call this process; the rollout worker puts its own name into vLLM's additional_config."""
    name = vllm_config.additional_config.get("rlgaf_worker", "rollout worker")
    rank = vllm_config.parallel_config.rank
    return f"{name} rank {rank}" if vllm_config.parallel_config.world_size > 1 else str(name)


def _tied_names(model: torch.nn.Module) -> set[str]:
    """Second names of shared parameters. They get no weights of their own, and the layer-wise life cycle,
    which gives every layer placeholders, hides that they are shared."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def _repack_tied(model: torch.nn.Module, names: set[str]) -> None:
    """Process the layers that share another layer's weight once more.

    No weight is loaded into them, so the life cycle leaves them alone; but CPU vLLM computes a tied LM head
    from a packed copy of the weight, which would stay the old policy's.
    """
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        cast(Any, layer).quant_method.process_weights_after_loading(layer)


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Have fused experts packed again with the weights that come.

    vLLM packs experts for CPU kernels only where it builds a layer's kernel. With the kernel still there it
    would put an update's weights unpacked into their place, and the kernel would read them as packed.
    """
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def _check_loaded(model: torch.nn.Module, names: set[str], receiver: str) -> None:
    """WireError when the model's loader wrote a layer's weights past the life cycle, into placeholders that
    are thrown away: the layer would keep the old ones.
    """
    lost = [
        name
        for prefix, layer in model.named_modules()
        if (info := get_layerwise_info(layer)).can_load() and info.load_numel == 0
        for name, parameter in layer.named_parameters(prefix, recurse=False)
        if name in names and parameter.is_meta
    ]
    if lost:
        raise WireError(
            f"{receiver}: vLLM does not reload {len(lost)} parameters of {type(model).__name__}, among them "
            f"{min(lost)}: use a policy.model of another type, or another release of vLLM"
        )


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Weights over gloo into CPU memory; the trainer is rank 0."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.timings = SyncTimings()
        self._receiver = _receiver_name(vllm_config)
        self._group: GlooGroup | None = None
        self._bucket_bytes = 0
        self._tied = _tied_names(model)
        self._parameters: set[str] = set()

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, leaving the one of an earlier trainer.

        Returns without a group when the trainer calls it off because another worker failed: that is not this
        worker's failure, and the next call joins the next group.
        """
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = GlooGroup.store(init_info.master_address, init_info.timeout_s, init_info.master_port)
        if not GlooGroup.arrive(store, rank):
            return
        self._group = GlooGroup(store, rank, init_info.world_size, init_info.timeout_s)
        self._bucket_bytes = init_info.bucket_bytes

    def start_weight_update(self) -> None:
        self.timings = SyncTimings()
        _forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)
        self._parameters = {name for name, _ in self.model.named_parameters()} - self._tied

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Raises WireError naming this worker and the tensor; the model is unusable afterwards."""
        if self._group is None:
            raise WireError(f"{self._receiver}: no weight-transfer group; call init_weight_transfer first")
        loader = CheckedLoader(cast(Any, self.model).load_weights, self._receiver, self._parameters)
        try:
            self.timings.wire_s = receive(self._group, update_info.entries(), self._bucket_bytes, loader)
        except RuntimeError as error:
            self.shutdown()
            raise WireError(f"{self._receiver}: the weight wire broke: {error}") from error
        self.timings.checksum_s, self.timings.load_s = loader.checksum_s, loader.load_s
        loader.finish()
        _check_loaded(self.model, self._parameters, self._receiver)

    def finish_weight_update(self) -> None:
        started = time.perf_counter()
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied(self.model, self._tied)
        self.timings.finalize_s = time.perf_counter() - started

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class CheckedNCCLWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's dense NCCL engine, packed mode only, loading through a CheckedLoader."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.timings = SyncTimings()
        self._receiver = _receiver_name(vllm_config)
        self._tied = _tied_names(model)
        self._parameters: set[str] = set()

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join the trainer's communicator, leaving the one of an earlier trainer."""
        self.shutdown()
        if not init_info.packed:
            raise WireError(f"{self._receiver}: rlgaf_nccl transfers packed buckets only")
        super().init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.timings = SyncTimings()
        super().start_weight_update()
        self._parameters = {name for name, _ in self.model.named_parameters()} - self._tied

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Raises WireError naming this worker and the tensor; the model is unusable afterwards."""
        if self.model_update_group is None:
            raise WireError(f"{self._receiver}: no weight-transfer group; call init_weight_transfer first")
        loader = CheckedLoader(cast(Any, self.model).load_weights, self._receiver, self._parameters)
        started = time.perf_counter()
        packed_nccl_broadcast_consumer(
            iterator=(
                (name, (shape, getattr(torch, dtype)))
                for name, dtype, shape in zip(
                    update_info.names, update_info.dtype_names, update_info.shapes, strict=True
                )
            ),
            group=self.model_update_group,
            src=0,
            post_unpack_func=loader,
            buffer_size_bytes=self.packed_buffer_size_bytes,
            num_buffers=self.packed_num_buffers,
            device=self.device,
        )
        self.timings.checksum_s, self.timings.load_s = loader.checksum_s, loader.load_s
        self.timings.wire_s = time.perf_counter() - started - loader.checksum_s - loader.load_s
        loader.finish()
        _check_loaded(self.model, self._parameters, self._receiver)

    def finish_weight_update(self) -> None:
        started = time.perf_counter()
        super().finish_weight_update()
        self.timings.finalize_s = time.perf_counter() - started


class SyncWorkerExtension:
    """Methods added to vLLM's worker class (`worker_extension_cls`), callable through `collective_rpc`."""

    weight_transfer_engine: Any

    def rlgaf_sync_timings(self) -> dict[str, float]:
        """Timings of the last sync as a plain dict."""
        return asdict(self.weight_transfer_engine.timings)
