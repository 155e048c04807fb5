"""TRL's GRPOTrainer with a constant reward, as fast as it runs on a CPU: transformers generation, no
reference model, no gradient checkpointing, one generation and one update per step.

The trainer's loop cannot be called step by step: it runs in a thread of its own and waits before each step.
"""

import queue
import tempfile
import threading
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.speed.contender import Result, Timer
from benchmarks.speed.workload import Workload

LAST = 10**6


def constant_reward(completions: list[Any], **columns: Any) -> list[float]:
    """The same for everybody."""
    return [1.0] * len(completions)


class Trl:
    """One optimizer step on the workload's prompts a turn."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(workload.threads)
        self.workload = workload
        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[Result | BaseException] = queue.Queue()
        self._trainer = GRPOTrainer(
            model=workload.model,
            reward_funcs=constant_reward,
            args=self._arguments(),
            train_dataset=Dataset.from_dict({"prompt": workload.prompts}),
            processing_class=AutoTokenizer.from_pretrained(workload.model, padding_side="left"),
            callbacks=[_StepByStep(self._go, self._done, workload)],
        )
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def _arguments(self) -> GRPOConfig:
        work = self.workload
        micro = min(work.trl_micro_batch, work.samples)
        if work.samples % micro:
            raise SystemExit(f"{work.samples} samples are no multiple of --trl-micro-batch {micro}")
        return GRPOConfig(
            output_dir=tempfile.mkdtemp(dir=work.scratch),
            use_cpu=True,
            bf16=False,
            fp16=False,
            model_init_kwargs={"dtype": work.dtype},
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=work.samples // micro,
            steps_per_generation=work.samples // micro,
            num_generations=work.group_size,
            max_completion_length=work.response_tokens,
            generation_kwargs={"min_new_tokens": work.response_tokens},
            shuffle_dataset=False,
            gradient_checkpointing=False,
            beta=0.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_steps=LAST,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
        )

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:  # handed to the main thread, which raises it
            self._done.put(error)

    def turn(self, number: int) -> Result:
        self._go.put(True)
        answer = self._done.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self._go.put(False)
        self._thread.join()


class _StepByStep(TrainerCallback):
    """Waits for permission before each step and reports its seconds. Generation lies inside the step."""

    def __init__(self, go: "queue.Queue[bool]", done: "queue.Queue[Any]", workload: Workload) -> None:
        self._go, self._done, self._workload = go, done, workload
        self._timer = Timer()

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if not self._go.get():
            raise SystemExit
        self._timer.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._timer.__exit__()
        seconds = self._timer.seconds
        self._done.put({"seconds": seconds, "samples_per_s": self._workload.samples / seconds})
