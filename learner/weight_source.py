"""The learner's parameters as a stream for the weight wire, whole whatever the ZeRO stage, each behind its
checksum.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from learner import lora
from rollout.wire import CHECKSUM_BYTES, CHECKSUM_PREFIX, checksum

MIB = 1 << 20


class ModuleWeights(WeightSource):
    """What a checkpoint of a causal LM holds, each tensor preceded by its checksum, whole whatever the ZeRO
    stage.

    module: an HF module; parameters may be plain, ZeRO-1/2 (whole on each rank) or ZeRO-3 (gathered a
    bucket at a time). dtype: floating-point parameters are cast to it (the rollout workers' dtype); None
    keeps theirs, as buffers do. With LoRA the stream is that of the plain model, adapters merged; the module
    itself stays as it is. Tied parameters appear once, under the first of their names; vLLM ties them itself.
    Names and shapes are those that vLLM reads in a checkpoint: a layer's experts, one parameter in
    transformers, come one by one. ValueError for a model whose checkpoint makes one tensor of several.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        gather_bytes: int = 64 * MIB,
    ) -> None:
        self.sends = True
        self.gather_s = 0.0
        self.checksum_s = 0.0
        self._module = module
        self._dtype = dtype
        self._gather_bytes = gather_bytes
        kept = module.state_dict().keys()
        buffers = [lora.PlainWeight(name, b, None) for name, b in module.named_buffers() if name in kept]
        self._weights = [*lora.plain_weights(module), *buffers]
        empty = {weight.name: self._empty(weight.parameter) for weight in self._weights}
        self._stored = [self._as_stored(name, tensor) for name, tensor in empty.items()]
        apart = {name: tensor.shape for stored in self._stored for name, tensor in stored.items()}
        whole = revert_weight_conversion(module, empty)
        if apart != {name: tensor.shape for name, tensor in whole.items()}:
            raise ValueError(
                f"policy.model of type {module.config.model_type!r}: a checkpoint keeps several of its "
                "parameters as one tensor, which a weight sync cannot send; use another model"
            )

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and whole shapes in wire order, checksums (uint8 [8]) included; gathers nothing."""
        metas: list[ParamMeta] = []
        for name, tensor in (pair for stored in self._stored for pair in stored.items()):
            metas.append(ParamMeta(CHECKSUM_PREFIX + name, torch.uint8, (CHECKSUM_BYTES,)))
            metas.append(ParamMeta(name, tensor.dtype, tuple(tensor.shape)))
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

    def _send_bucket(self, bucket: list[lora.PlainWeight]) -> Iterator[tuple[str, torch.Tensor]]:
        started = time.perf_counter()
        with self._gathered([parameter for weight in bucket for parameter in weight.sources()]):
            self.gather_s += time.perf_counter() - started
            for weight in bucket if self.sends else ():
                whole = weight.value().to(self._wire_dtype(weight.parameter))
                if not torch.isfinite(whole).all():
                    raise FloatingPointError(f"{weight.name} is not finite in {whole.dtype}; it is not sent")
                for name, tensor in self._as_stored(weight.name, whole).items():
                    started = time.perf_counter()
                    value = checksum(tensor)
                    self.checksum_s += time.perf_counter() - started
                    yield CHECKSUM_PREFIX + name, value
                    yield name, tensor

    def _as_stored(self, name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a checkpoint makes of one parameter."""
        return revert_weight_conversion(self._module, {name: whole})  # type: ignore[no-any-return]

    def _empty(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter's whole shape, on the meta device, in the dtype of the wire."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return torch.empty(shape, dtype=self._wire_dtype(parameter), device="meta")

    def _gather_buckets(self) -> Iterator[list[lora.PlainWeight]]:
        bucket: list[lora.PlainWeight] = []
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
    def _gathered(parameters: list[torch.Tensor]) -> AbstractContextManager[Any]:
        partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        if not partitioned:
            return nullcontext()
        import deepspeed  # its submodules cannot be imported first: they import each other in a circle

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            partitioned, modifier_rank=None
        )
        return gathered

    def _wire_dtype(self, weight: torch.Tensor) -> torch.dtype:
        cast = isinstance(weight, torch.nn.Parameter) and weight.is_floating_point()
        return self._dtype if self._dtype is not None and cast else weight.dtype
