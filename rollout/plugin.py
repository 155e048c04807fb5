"""vLLM plugin: registers the weight-transfer engines in every process of an engine, and ties its life to
the worker's.

vLLM calls `register` (entry point `vllm.general_plugins`) once in each of its processes. vLLM's engine
process does not notice the SIGKILL of the process that started it and would stay behind with its memory; a
thread watches for that.
"""

import os
import threading
import time

from rollout.stacks import show_stacks_on_signal

PARENT_VARIABLE = "RLGAF_ENGINE_PARENT"
"""Process id of the rollout worker whose children end with it."""

WATCH_INTERVAL_S = 0.5


def register() -> None:
    """Register engines by name (imported only when used) and start the watch. May be called repeatedly."""
    import torch
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    show_stacks_on_signal()
    if torch.cpu._is_amx_tile_supported():
        # Linux lets a process use tiles once it has asked. oneDNN asks at its first large product; vLLM's
        # attention does not, and a small bfloat16 model reaches it first: illegal instruction.
        torch.cpu._init_amx()
    for name, class_name in (
        ("gloo", "GlooWeightTransferEngine"),
        ("rlgaf_nccl", "CheckedNCCLWeightTransferEngine"),
    ):
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, "rollout.weight_transfer", class_name)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() == int(parent):
        threading.Thread(
            target=_exit_with_parent, args=(int(parent),), daemon=True, name="rlgaf-parent"
        ).start()


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_INTERVAL_S)
    os._exit(1)
