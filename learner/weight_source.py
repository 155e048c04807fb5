"""The learner's parameters as a stream for the weight wire, whole whatever the ZeRO stage, each behind its
checksum.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from learner import lora
from rollout.wire import CHECKSUM_BYTES, CHECKSUM_PREFIX, checksum

MIB = 1 << 20


class _Weight(NamedTuple):
    """A weight of the plain model: its name there, its parameter, and the adapted layer it belongs to."""

    name: str
    parameter: torch.nn.Parameter
    adapted: Any | None

    def sources(self) -> list[torch.nn.Parameter]:
        """All parameters that its value is made of."""
        return [self.parameter] if self.adapted is None else list(self.adapted.parameters())

    def value(self) -> torch.Tensor:
        """Detached, adapters merged; its sources must be whole on this rank."""
        return self.parameter.detach() if self.adapted is None else lora.merged_weight(self.adapted)


class ModuleWeights(WeightSource):
    """The parameters of a causal LM, each preceded by its checksum, whole whatever the ZeRO stage.

    module: an HF module; parameters may be plain, ZeRO-1/2 (whole on each rank) or ZeRO-3 (gathered a
    bucket at a time). dtype: floating-point parameters are cast to it (the rollout workers' dtype); None
    keeps theirs. With LoRA the stream is that of the plain model, adapters merged; the module itself stays
    as it is. Tied parameters appear once, under the first of their names; vLLM ties them itself.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        dtype: torch.dtype | None = None,
        gather_bytes: int = 64 * MIB,
    ) -> None:
        self.sends = True
        self.gather_s = 0.0
        self.checksum_s = 0.0
        self._dtype = dtype
        self._gather_bytes = gather_bytes
        adapted = {f"{name}.base_layer.weight": layer for name, layer in lora.adapters(module)}
        self._weights = [
            _Weight(plain, parameter, adapted.get(name))
            for name, parameter in module.named_parameters()
            if (plain := lora.merged_name(name)) is not None
        ]

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and whole shapes in wire order, checksums (uint8 [8]) included; gathers nothing."""
        metas: list[ParamMeta] = []
        for name, parameter, _ in self._weights:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            metas.append(ParamMeta(CHECKSUM_PREFIX + name, torch.uint8, (CHECKSUM_BYTES,)))
            metas.append(ParamMeta(name, self._wire_dtype(parameter), shape))
        return metas

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One pass. A rank with `sends` off only takes part in the gathers and yields nothing.
        FloatingPointError for a weight that is not finite as it would be sent.

        A pass must be run to its end: its gathers are collectives.
        """
        self.gather_s = self.checksum_s = 0.0
        with torch.no_grad():
            for bucket in self._gather_buckets():
                yield from self._send_bucket(bucket)

    def _send_bucket(self, bucket: list[_Weight]) -> Iterator[tuple[str, torch.Tensor]]:
        started = time.perf_counter()
        with self._gathered([parameter for weight in bucket for parameter in weight.sources()]):
            self.gather_s += time.perf_counter() - started
            for weight in bucket if self.sends else ():
                tensor = weight.value().to(self._wire_dtype(weight.parameter))
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(f"{weight.name} is not finite in {tensor.dtype}; it is not sent")
                started = time.perf_counter()
                value = checksum(tensor)
                self.checksum_s += time.perf_counter() - started
                yield CHECKSUM_PREFIX + weight.name, value
                yield weight.name, tensor

    def _gather_buckets(self) -> Iterator[list[_Weight]]:
        bucket: list[_Weight] = []
        used = 0
        for weight in self._weights:
            # A partitioned parameter's own numel is 0.
            size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weight.sources())
            if bucket and used + size > self._gather_bytes:
                yield bucket
                bucket, used = [], 0
            bucket.append(weight)
            used += size
        if bucket:
            yield bucket

    @staticmethod
    def _gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        if not partitioned:
            return nullcontext()
        import deepspeed  # its submodules cannot be imported first: they import each other in a circle

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            partitioned, modifier_rank=None
        )
        return gathered

    def _wire_dtype(self, parameter: torch.nn.Parameter) -> torch.dtype:
        return self._dtype if self._dtype is not None and parameter.is_floating_point() else parameter.dtype
