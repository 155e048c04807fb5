"""Data-parallel training of one module with DeepSpeed ZeRO, so that any split of a step gives the same
update.

A step is any number of micro-batches on any number of ranks, as many on each. The loss function weighs each
item with its share of the whole step; losses of micro-batches and ranks then simply add up, and the result
equals one unsplit batch on one rank. Two habits of DeepSpeed are undone for that: its fixed division by an
accumulation number (`managed_gradient_accumulation = false`: we call `step`) and its mean over ranks (losses
are scaled by their number).

    model = TrainableModel(module, cfg, dtype=torch.float32)
    metrics = model.step(micro_batches, lambda module, batch: LossOutput(...))

Every rank must call `step`, `save`, `load` and `gathered` together, and run the same number of forward
passes.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from learner.config import OptimizerConfig
from learner.cpu import cpu_computes_bfloat16
from learner.losses import LossOutput
from learner.random_state import load_random_state, save_random_state
from learner.whole_state import (
    MOMENTS,
    PARTS,
    WholeFiles,
    own_share,
    read_json,
    read_whole,
    trained_weights,
    whole_shape,
    write_files,
    write_whole,
)

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
ParamGroups = list[dict[str, Any]]
STATE = "engine.json"


def resolve_device(choice: str) -> torch.device:
    """`auto` is CUDA where there is a GPU. Raises ValueError when CUDA is asked for and absent."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            'device = "cuda", but this process sees no GPU; set device = "cpu" or give the rank a GPU'
        )
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def resolve_dtype(compute_dtype: str, model_dtype: str, device: torch.device) -> torch.dtype:
    """Dtype of the arithmetic: as configured, or with `auto` the model's, but fp32 on CPUs that are slow in
    bfloat16.
    """
    name = model_dtype if compute_dtype == "auto" else compute_dtype
    slow = device.type == "cpu" and not cpu_computes_bfloat16()
    if compute_dtype == "auto" and name == "bfloat16" and slow:
        log.info("computing in float32: on this CPU bfloat16 would be many times slower")
        name = "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def ensure_process_group(device: torch.device, timeout_s: float = 1800.0) -> None:
    """Use the process group that a launcher made, or make one of a single rank."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.HashStore(),
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=timeout_s),
    )


def default_param_groups(module: nn.Module, weight_decay: float) -> ParamGroups:
    """Trainable parameters in two groups: matrices with weight decay, vectors (norms, biases) without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2]
    vectors = [p for p in trainable if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def schedule_factor(cfg: OptimizerConfig, update: int) -> float:
    """Learning-rate factor of optimizer update number `update` (from 0): linear warm-up, then the configured
    shape."""
    if update < cfg.warmup_steps:
        return (update + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return 1.0
    if cfg.schedule_steps is None:
        raise ValueError(
            f'lr_schedule = "{cfg.lr_schedule}" needs schedule_steps, the number of updates until it ends'
        )
    done = min(1.0, (update - cfg.warmup_steps) / max(1, cfg.schedule_steps - cfg.warmup_steps))
    return 1.0 - done if cfg.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class TrainableModel:
    """A module, its fp32 masters, AdamW and the learning-rate schedule, sharded by ZeRO.

    `param_groups` are AdamW's (a group may bring its own `lr`); None: `default_param_groups`.
    """

    updates: int
    """Optimizer updates done."""
    device: torch.device
    dtype: torch.dtype

    def __init__(
        self,
        module: nn.Module,
        cfg: OptimizerConfig,
        *,
        dtype: torch.dtype = torch.float32,
        param_groups: ParamGroups | None = None,
    ) -> None:
        self.cfg = cfg
        self.dtype = dtype
        self.device = resolve_device(cfg.device)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        ensure_process_group(self.device, cfg.step_timeout_s)
        deepspeed = load_deepspeed(self.device)
        groups = param_groups or default_param_groups(module, cfg.weight_decay)
        optimizer = torch.optim.AdamW(
            groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0, fused=True
        )
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        module.to(self.device)
        # Not the buffers: rotary frequencies are fp32 wherever the model is served.
        for param in module.parameters():
            param.data = param.data.to(dtype)
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._deepspeed_config()
        )
        self.updates = 0

    @property
    def module(self) -> nn.Module:
        """The wrapped module. Under ZeRO-3 its parameters are shards: read them inside `gathered`."""
        return self.engine.module

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank()

    @property
    def ranks(self) -> int:
        return torch.distributed.get_world_size()

    def step(
        self,
        micro_batches: Sequence[Batch],
        loss_fn: Callable[[nn.Module, Batch], LossOutput],
        *,
        lr_factor: float = 1.0,
    ) -> dict[str, float]:
        """One optimizer update from this rank's micro-batches, its learning rate scaled by `lr_factor`. At 0
        they are only looked at: weights, moments and schedule stay, and `grad_norm` is 0. Returns sums and
        maxima over all of the step's micro-batches and ranks, `grad_norm` (before clipping), `lr`, and
        `skipped`: 1 when loss or gradient of some rank were not finite. Weights, moments and schedule then
        stay as they were, on all ranks.
        """
        learns = lr_factor > 0
        self.engine.train(learns)
        factor = schedule_factor(self.cfg, self.updates) * lr_factor
        for group, peak in zip(self.engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        sums: dict[str, torch.Tensor] = {}
        maxima: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            with torch.set_grad_enabled(learns):
                out = loss_fn(self.engine, batch)
            if learns:
                self.engine.backward(out.loss * self._weight_of(out.loss))
            for name, value in out.sums.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
            for name, value in out.maxima.items():
                value = value.detach().double()
                maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        grad_norm = self._update() if learns else 0.0
        metrics = self.reduce(sums, "sum") | self.reduce(maxima, "max")
        skipped = float(math.isnan(grad_norm))
        return metrics | {"grad_norm": grad_norm, "lr": self.cfg.lr * factor, "skipped": skipped}

    def _weight_of(self, loss: torch.Tensor) -> torch.Tensor:
        """The number of ranks; NaN for a loss that is not finite, whose gradient may be: then that is not
        either, and all ranks see it in the norm."""
        bad = ~torch.isfinite(loss.detach())
        return torch.full_like(loss.detach(), self.ranks).masked_fill(bad, math.nan)

    def _update(self) -> float:
        """The gradient's norm; NaN when it is not finite, which DeepSpeed looks at before the optimizer."""
        self.engine.step()
        if not self.engine.was_step_applied():
            log.warning("update %d was skipped: loss or gradient is not finite", self.updates)
            return math.nan
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"update {self.updates} was made with a gradient norm of {grad_norm}")
        self.updates += 1
        return grad_norm

    def reduce(self, values: dict[str, torch.Tensor], how: str) -> dict[str, float]:
        """Sum or maximum of scalars over the ranks, which must bring the same names."""
        if not values:
            return {}
        names = sorted(values)
        stacked = torch.stack([values[name].to(self.device, torch.float64) for name in names])
        op = torch.distributed.ReduceOp.SUM if how == "sum" else torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(stacked, op=op)
        return dict(zip(names, stacked.tolist(), strict=True))

    @contextmanager
    def gathered(self, params: Iterable[torch.Tensor] | None = None) -> Iterator[None]:
        """Whole weights of `params` (None: all) on every rank inside this block, whatever the ZeRO stage.
        Read-only."""
        chosen = list(self.module.parameters() if params is None else params)
        if self.cfg.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(chosen, modifier_rank=None):
            yield

    def require_finite(self) -> None:
        """Collective. Raises FloatingPointError on every rank when a trained weight is not finite on some
        rank: nothing is then saved, sent or published."""
        bad = next((name for name, weight in trained_weights(self.module) if not _finite(weight)), None)
        found = torch.tensor(0.0 if bad is None else 1.0, device=self.device)
        torch.distributed.all_reduce(found)
        if found:
            where = f", the first is {bad}" if bad else ""
            raise FloatingPointError(
                f"after update {self.updates} there are weights that are not finite{where}; they are neither "
                "saved nor sent: go on from the last checkpoint with a lower lr or grad_clip"
            )

    def save(self, folder: Path | str) -> None:
        """Write everything that the next update depends on: masters, moments, update count, random states.

        Raises FloatingPointError for weights that are not finite.
        """
        self.require_finite()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._set_moments_step()
        weights = trained_weights(self.module)
        tensors = ((f"{part}/{name}", read_whole(p, part)) for name, p in weights for part in PARTS)
        write_files(folder, own_share(tensors))
        save_random_state(folder, self.rank)
        if self.rank == 0:
            (folder / STATE).write_text(json.dumps({"updates": self.updates, "ranks": self.ranks}))
        torch.distributed.barrier()

    def load(self, folder: Path | str) -> None:
        """Continue where `save` left off, exactly on as many ranks, on any other number and with any ZeRO
        stage but for the random states.

        Raises FileNotFoundError for a folder without a state, ValueError for one of another model.
        """
        folder = Path(folder)
        if not (folder / STATE).is_file():
            raise FileNotFoundError(f"{folder} holds no engine state: {STATE} is missing")
        state = read_json(folder / STATE)
        files = WholeFiles(folder)
        self.updates = state["updates"]
        self._set_moments_step()
        for name, weight in trained_weights(self.module):
            for part in PARTS:
                value = files.read(f"{part}/{name}", whole_shape(weight))
                write_whole(weight, part, value.to(self.device))
        load_random_state(folder, self.rank, self.ranks, state["ranks"])

    def _set_moments_step(self) -> None:
        """AdamW's states as it makes them at its first step, where there are none yet, at `updates` steps."""
        optimizer = self._optimizer.optimizer
        masters = getattr(self._optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3's
        if masters is None:
            masters = [master for group in optimizer.param_groups for master in group["params"]]
        for master in masters:
            state = optimizer.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state |= {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
            state["step"].fill_(self.updates)
        if self.cfg.zero_stage < 3:
            # DeepSpeed links states after its first parameter group's step, when the others have none yet.
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _deepspeed_config(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": cfg.grad_clip,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            # Micro-batches' gradients are added and reduced in fp32: bf16 rounding would depend on the split.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            # A single rank reduces nothing: a copy of all gradients into a reduction buffer would be wasted.
            "zero_optimization": {
                "stage": cfg.zero_stage,
                "overlap_comm": False,
                "contiguous_gradients": self.ranks > 1 or cfg.zero_stage == 3,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }


def _finite(weight: nn.Parameter) -> bool:
    """Whether what this rank holds of a parameter is finite; a shard's padding does not count."""
    shard = getattr(weight, "ds_tensor", None)
    if shard is None:
        return bool(torch.isfinite(weight.detach()).all())
    size = shard.numel()
    rest = weight.ds_numel - torch.distributed.get_rank() * size  # type: ignore[attr-defined]
    return bool(torch.isfinite(shard.detach().flatten()[: max(0, rest)]).all())


def load_deepspeed(device: torch.device) -> Any:
    """The module, its process group formed; the one way to get it, here and in tests. Nothing is compiled."""
    if device.type == "cpu":
        # Read once, when DeepSpeed is first imported. The driver's environment says "cuda" if it has GPUs.
        os.environ["DS_ACCELERATOR"] = "cpu"
    began = time.monotonic()
    import deepspeed
    import deepspeed.ops

    # The one kernel DeepSpeed would compile here all-reduces inference over shared memory; training never
    # asks for that. Its build waits without a deadline for the build folder's lock, be its holder dead.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    log.info("DeepSpeed %s is ready after %.0f s", deepspeed.__version__, time.monotonic() - began)
    return deepspeed
