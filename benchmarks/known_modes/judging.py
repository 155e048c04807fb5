"""The evaluator of a run in one process: the system's own, that keeps weights instead of test responses.

`best` and `last` are measured on test prompts at the end. Base and human rows do not depend on the run: they
are measured once, by the cells without a method.
"""

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.known_modes.artefacts import Plant, artefact_rate
from benchmarks.known_modes.systems import OneProcessPolicy, OneProcessSystem, Weights
from learner.pretrained import mean_nll
from services.answers import first_prompts
from services.evaluator import Evaluator, Row


class Judge(Evaluator):
    """`Evaluator` of a `OneProcessPolicy`."""

    system: OneProcessPolicy
    plant: Plant | None = None
    """Artefact that test rows count."""
    best_weights: Weights
    """The policy's, at its best evaluation on selection prompts."""
    test_responses: pa.Table
    """Trajectories of the last test row."""

    async def _keep_best(self, step: int, key: float) -> None:
        self.best_step, self.best_key, self.best_weights = step, key, self.system.weights()

    async def _keep_test(self, name: str, step: int) -> None:
        """Nothing is measured on test prompts before the end."""

    async def test_row(self, step: int) -> Row:
        """The policy as it is, measured on test prompts; with `moved`, the nats per response that it is away
        from the base: E log policy − log base over its own responses."""
        split, prompts = self.system.splits.test, self.config.evaluation.test_prompts
        texts, responses = await self._draw(split, prompts, step)
        nll = (await self.system.human_nll(split, prompts)).per_token
        row = await self._with_extra(await self._measure(texts, nll), texts, "model", nll, split, prompts)
        if self.plant is not None:
            row["artefact_rate"] = artefact_rate(self.plant, responses)
        self.test_responses = responses
        return {**row, "step": step, "moved": self._moved(responses)}

    async def real_row(self, fresh: list[str], nll: float) -> Row:
        """Other human answers in the policy's place, by the same instruments at the same counts."""
        split, prompts = self.system.splits.test, self.config.evaluation.test_prompts
        human = first_prompts(split, prompts)
        texts = pa.table(
            {
                "prompt_id": human["prompt_id"],
                "prompt": human["prompt"],
                "human": human["response"],
                "model": pa.array(fresh[: human.num_rows], pa.string()),
            }
        )
        return await self._with_extra(await self._measure(texts, nll), texts, "model", nll, split, prompts)

    def _moved(self, responses: pa.Table) -> float:
        config = self.config
        under_base = -mean_nll(config.policy, self.system.policy.cfg, responses)
        sampled = responses["response_logprobs"].combine_chunks().flatten()
        per_token = pc.mean(sampled).as_py() - under_base
        return float(per_token * len(sampled) / responses.num_rows)


def discriminator_accuracy(system: OneProcessSystem, responses: pa.Table) -> float:
    """Balanced accuracy of the last discriminator (as its loss defines it) on test demonstrations, which
    nothing was trained on or chosen by, against the policy's test responses. It is the run's last act: the
    health gate hears of it.
    """
    human = first_prompts(system.splits.test, responses.num_rows)
    judged = pa.table(
        {
            "prompt_id": human["prompt_id"],
            "prompt_text": human["prompt_text"],
            "response_text": human["response"],
            "finish_reason": pa.array(["stop"] * human.num_rows, pa.string()),
        }
    )
    judge = system.judge
    judge.config = judge.config.model_copy(update={"heldout_size": responses.num_rows})
    return judge.evaluate(judged, responses, system.config.run.steps)["accuracy"]
