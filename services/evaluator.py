"""Evaluations of a run: selection prompts during training, test prompts for base, best and last only.

The best checkpoint is the one with the highest `selection_key` (C2ST and coverage on selection prompts),
never the one with the highest reward. Test responses of base and best are drawn when these policies are in
place and measured at the end, all on the same prompts.

Invariant: when a run goes on, wherever it was killed, `best/`, its test responses and its record are of one
policy. They are written out of sight, count from one renaming on, and are then moved to their places; a
resumed run makes up for what is left of that.
"""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.files import put_in_place, whole_folder
from services.answers import first_prompts, human_answers, side_by_side
from services.config import Config
from services.evaluation import extra_measures
from services.evaluation.embed import Embedder, make_embedder
from services.evaluation.evaluate import evaluate_texts, human_row, selection_key
from services.evaluation.extra_measures import Answers, load_extra_measures, with_extra_measures
from services.evaluation.monitors import evaluation_monitors
from services.policy_side import PolicySide
from services.report import write_samples
from services.run_folder import BEST_RECORD, Best, read_best
from services.waiting import within

Row = dict[str, Any]
BEST = ("best", "samples/test-best.parquet", BEST_RECORD)
"""What is kept of the best policy in the run's folder: model, test responses, record."""


class Evaluator:
    """Measures the policy that the rollout workers hold."""

    def __init__(self, config: Config, system: PolicySide, say: Callable[[str], None]) -> None:
        self.config = config
        self.system = system
        self.say = say
        self.curve: list[tuple[int, Row]] = []
        self.best_step = -1
        self.best_key = float("-inf")
        self.test_nll: dict[str, float] = {}
        self._embedder: Embedder | None = None
        self._extra = load_extra_measures(config.evaluation.extra_measures)
        self._train = system.splits.train["response"].to_pylist()
        self.responses = pa.table({})
        """Trajectories of the last selection evaluation."""
        self.monitors: dict[str, float] = {}
        """What it says about collapse, repetition and copying."""

    async def selection(self, step: int) -> tuple[Row, list[dict[str, str]]]:
        """Evaluate on selection prompts; keeps the model and its test responses if it is the best so far.

        Returns the row and the first samples beside their demonstrations.
        """
        split, prompts = self.system.splits.selection, self.config.evaluation.prompts
        texts, self.responses = await self._draw(split, prompts, step)
        self.monitors = await asyncio.to_thread(
            evaluation_monitors,
            texts["prompt_id"].to_pylist(),
            texts["model"].to_pylist(),
            texts["human"].to_pylist(),
            self._train,
            await asyncio.to_thread(self._embed),
            seed=self.config.evaluation.seed,
        )
        human = await self.system.human_nll(split, prompts)
        self.monitors["nll_tail"] = human.tail
        nll = human.per_token
        row = await self._with_extra(await self._measure(texts, nll), texts, "model", nll, split, prompts)
        self.curve.append((step, row))
        write_samples(
            self.config.folder, step, *(texts[name].to_pylist() for name in ("prompt", "human", "model"))
        )
        if step == 0:
            await self._keep_test("base", step)
        if selection_key(row) > self.best_key:
            await self._keep_best(step, selection_key(row))
        shown = texts.slice(0, self.config.evaluation.shown_samples)
        return row, shown.select(["prompt", "human", "model"]).to_pylist()

    async def look(self) -> dict[str, float]:
        """The monitor of selection answers' likelihood alone: a forward pass, without samples."""
        split, prompts = self.system.splits.selection, self.config.evaluation.prompts
        return {"nll_tail": (await self.system.human_nll(split, prompts)).tail}

    async def finish(self, step: int) -> dict[str, Row]:
        """The closing table's rows on test prompts: base, best, last, human."""
        split, prompts = self.system.splits.test, self.config.evaluation.test_prompts
        await self.export("last")
        await self._keep_test("last", step)
        rows: dict[str, Row] = {}
        for name in ("base", "best", "last"):
            texts = pq.read_table(self._test_file(name))
            nll = self.test_nll[name]
            row = await self._with_extra(await self._measure(texts, nll), texts, "model", nll, split, prompts)
            rows[name] = {**row, "step": self._step_of(name, step)}
        texts, least = pq.read_table(self._test_file("last")), min(self.test_nll.values())
        row = await asyncio.to_thread(
            human_row,
            texts["prompt_id"].to_pylist(),
            texts["human"].to_pylist(),
            self._train,
            least,
            self.config.evaluation,
            await asyncio.to_thread(self._embed),
        )
        rows["human"] = await self._with_extra(row, texts, "human", least, split, prompts)
        return rows

    def samples(self, count: int) -> list[dict[str, str]]:
        """The first test responses of base and best beside their demonstrations."""
        base, best = (pq.read_table(self._test_file(name)) for name in ("base", "best"))
        return [
            {
                "prompt": base["prompt"][i].as_py(),
                "human": base["human"][i].as_py(),
                "base": base["model"][i].as_py(),
                "model": best["model"][i].as_py(),
            }
            for i in range(min(count, base.num_rows))
        ]

    async def export(self, name: str) -> None:
        """Write the policy to the run's folder `name`, whole or not at all."""
        with whole_folder(self.config.folder / name) as partial:
            await self.system.export(partial)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "curve": self.curve,
            "test_nll": self.test_nll,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. The best policy is the one that the folder has the record of, which may be
        younger; without a record, as in a copy that was cut off there, the next one evaluated is the best."""
        self.curve = [(step, row) for step, row in state["curve"]]
        self.test_nll = state["test_nll"]
        self._settle_best()

    async def _keep_best(self, step: int, key: float) -> None:
        """Put the policy in place of the best one before."""
        with whole_folder(self._new_best()) as partial:
            model, test, record = (partial / name for name in BEST)
            await self.system.export(model)
            test.parent.mkdir(parents=True)
            nll = self.test_nll["base"]
            if step == 0:  # it is the base, whose answers are at hand
                shutil.copyfile(self._test_file("base"), test)
            else:
                nll = await self._answer_test(step, test)
            record.write_text(Best(step=step, key=key, nll=nll).model_dump_json())
        self._settle_best()

    def _settle_best(self) -> None:
        """Move a new best, where there is one, to its places, and read the record."""
        for name in BEST:
            new, place = self._new_best() / name, self.config.folder / name
            if new.exists():
                put_in_place(new, place)
        shutil.rmtree(self._new_best(), ignore_errors=True)
        if (best := read_best(self.config.folder)) is not None:
            self.best_step, self.best_key, self.test_nll["best"] = best.step, best.key, best.nll

    async def _keep_test(self, name: str, step: int) -> None:
        self._test_file(name).parent.mkdir(parents=True, exist_ok=True)
        self.test_nll[name] = await self._answer_test(step, self._test_file(name))

    async def _answer_test(self, step: int, file: Path) -> float:
        """Write the policy's test responses to a file; returns the NLL of the human ones."""
        split, prompts = self.system.splits.test, self.config.evaluation.test_prompts
        texts, _ = await self._draw(split, prompts, step)
        pq.write_table(texts, file)
        return (await self.system.human_nll(split, prompts)).per_token

    async def _draw(self, split: pa.Table, prompts: int, step: int) -> tuple[pa.Table, pa.Table]:
        """TEXTS, one row per human answer and sample; and the samples as trajectories."""
        responses = await self.system.sample(split, prompts, step)
        human = first_prompts(split, prompts)
        return side_by_side(human, responses, self.system.renderer), responses

    async def _measure(self, texts: pa.Table, nll: float) -> Row:
        return await asyncio.to_thread(
            evaluate_texts,
            texts["prompt_id"].to_pylist(),
            texts["model"].to_pylist(),
            texts["human"].to_pylist(),
            self._train,
            nll,
            self.config.evaluation,
            await asyncio.to_thread(self._embed),
        )

    async def _with_extra(
        self, row: Row, texts: pa.Table, side: str, nll: float, split: pa.Table, prompts: int
    ) -> Row:
        """`row` with the user's own measures of the answers in column `side` of `texts`."""
        if self._extra is None:
            return row
        limit, canonical = self.config.sampling.max_tokens, self.config.discriminator.canonical
        human = human_answers(first_prompts(split, prompts), self.system.renderer, limit, canonical)
        answers = Answers(
            prompts=texts["prompt"].to_pylist(),
            human=texts["human"].to_pylist(),
            model=texts[side].to_pylist(),
            demonstrations=self._train,
            nll=nll,
            human_tokens=pc.mean(pc.list_value_length(human["response_ids"])).as_py(),
        )
        measuring = asyncio.to_thread(with_extra_measures, row, self._extra, answers)
        return await within(extra_measures.DEADLINE_S, extra_measures.FIELD, measuring)

    def _embed(self) -> Embedder | None:
        settings = self.config.evaluation
        if self._embedder is None:
            self._embedder = make_embedder(
                settings.embedding_model,
                self.config.policy.model,
                threads=settings.embedding_threads,
                max_tokens=settings.embedding_max_tokens,
                trust_remote_code=self.config.policy.trust_remote_code,
            )
        return self._embedder

    def _new_best(self) -> Path:
        return self.config.folder / ".best"

    def _test_file(self, name: str) -> Path:
        return self.config.folder / "samples" / f"test-{name}.parquet"

    def _step_of(self, name: str, last: int) -> int:
        return {"base": 0, "best": self.best_step, "last": last}[name]
