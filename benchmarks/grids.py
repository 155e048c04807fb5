"""The declared grids: which runs answer which question. Data only; `benchmarks/README.md` says how to run
them.

Settings stand over `examples/known_modes/known-modes.toml`. Candidates are all the tuning there is: as many
for every method of a grid, chosen among by the selection split, every one of them kept.
"""

from dataclasses import replace
from typing import Any

from benchmarks.known_modes.artefacts import GUARD_OFF
from benchmarks.known_modes.cells import Cell, Data, Grid

PER_TOKEN: dict[str, Any] = {"discriminator.level": "token"}
"""Discounted by .25, the default at this level."""
ABSORBING: dict[str, Any] = {"learner.absorbing_end": True}
"""With `prob` per token, the recipe of `examples/debian-synopses.toml`."""
BRADLEY_TERRY: dict[str, Any] = {"discriminator.loss": "bradley_terry"}
PAUSES: dict[str, Any] = {"discriminator.health.pause_policy": True}
"""The policy waits while its judge is at chance."""
REFERENCE = Cell("base and fresh demonstrations", kind="reference")


def _form(name: str) -> dict[str, Any]:
    """A reward form, with the discriminator's loss that it needs."""
    losses = BRADLEY_TERRY if name in ("bradley_terry", "relativistic") else {}
    return {"discriminator.reward.form": name, **losses}


def _zero(name: str) -> dict[str, Any]:
    """What a reward form needs per token, where a constant in the scores would pay for length."""
    return {"discriminator.score_centring": 0.01} if name == "bradley_terry" else {}


DEFAULT = Grid(
    "default",
    "Do the default settings keep all modes, with 2,048 demonstrations?",
    (REFERENCE, Cell("rlgaf"), Cell("rlgaf, health.pause_policy", PAUSES)),
)

OFTEN = {"evaluation.every": 15, "evaluation.prompts": 512}
"""Monitors look at evaluations; these come often enough to see a collapse begin."""

FROZEN_JUDGE: dict[str, Any] = {
    "discriminator.frozen": True,
    "discriminator.warmup_max_steps": 500,
    "discriminator.warmup_accuracy": 1.0,
    "discriminator.warmup_patience": 5,
}
"""As good a judge as held-out demonstrations allow, and then no further one."""
GUMBEL_ALONE: dict[str, Any] = {
    "learner.gumbel.weight": 1.0,
    "learner.gumbel.policy_gradient_weight": 0.0,
}
FORMS = ("neg_log_one_minus_d", "prob", "logit", "log_d", "bradley_terry", "relativistic")
REWARDS = Grid(
    "rewards",
    "Which reward forms keep modes, for whole sequences and per token? Does an alarm come before a collapse?",
    (
        REFERENCE,
        *(Cell(f"{name}, sequence", OFTEN | _form(name)) for name in FORMS),
        *(Cell(f"{name}, per token", OFTEN | _form(name) | PER_TOKEN | _zero(name)) for name in FORMS),
        Cell("prob, per token, absorbing end", OFTEN | _form("prob") | PER_TOKEN | ABSORBING),
        Cell("logit, per token, gamma 1", OFTEN | _form("logit") | PER_TOKEN | {"learner.gamma": 1.0}),
        Cell(
            "equal learning rates, one discriminator step",
            OFTEN
            | _form("logit")
            | {
                "discriminator.lr": 1.2e-4,
                "discriminator.steps_per_policy_step": 1,
                "discriminator.health.enabled": False,
            },
        ),
    ),
)

EARLY: dict[str, Any] = OFTEN | {
    "run.steps": 120,
    "learner.schedule_steps": 300,
    "evaluation.look_every": 5,
    "evaluation.test_prompts": 512,
}
"""The beginning of a run, where modes are lost, seen closely."""
ALARMS = Grid(
    "alarms",
    "Does an alarm come before a mode is lost? The first 120 of 300 steps, on seeds that set no bound.",
    (
        replace(REFERENCE, settings={"evaluation.test_prompts": 512}),
        *(Cell(f"{name}, sequence", EARLY | _form(name)) for name in FORMS),
        *(
            Cell(f"{name}, per token", EARLY | _form(name) | PER_TOKEN)
            for name in ("neg_log_one_minus_d", "prob", "log_d")
        ),
        Cell("logit, per token, gamma 1", EARLY | _form("logit") | PER_TOKEN | {"learner.gamma": 1.0}),
        Cell("frozen, KL 0.05", EARLY | FROZEN_JUDGE | {"learner.kl_coef": 0.05}),
        Cell(
            "Gumbel-Softmax alone, tau 1",
            EARLY | GUMBEL_ALONE | {"learner.gumbel.schedule": "constant"},
        ),
    ),
    seeds=(3, 4, 5),
)

FINE = {"evaluation.every": 25}
"""As good a choice of checkpoints as early stopping has."""
ONE_STEP: dict[str, Any] = {"discriminator.steps_per_policy_step": 1, "discriminator.health.extra_steps": 0}

SPELLING = ("trailing newline", "missing end", "other tokens", "leading space")


def _artefact(plant: str) -> tuple[Cell, ...]:
    base = "known-modes-merged" if plant == "other tokens" else "known-modes"
    data = Data(plant=plant)
    return (
        Cell(f"{plant}: audit, guard off", GUARD_OFF, data=data, kind="audit", base=base, guard=False),
        Cell(f"{plant}: audit, guard on", data=data, kind="audit", base=base),
        Cell(f"{plant}: guard off", GUARD_OFF, data=data, base=base, guard=False),
        Cell(f"{plant}: guard on", data=data, base=base),
    )


ARTEFACTS = Grid(
    "artefacts",
    "Artefacts planted in the demonstrations: are they seen, and does the canonical path keep them out?",
    (
        REFERENCE,
        *(cell for plant in SPELLING for cell in _artefact(plant)),
        Cell("trailing word: audit", data=Data(plant="trailing word"), kind="audit"),
        Cell("trailing word (content)", data=Data(plant="trailing word")),
        Cell("30 % longer: audit", data=Data(source="long"), kind="audit"),
        Cell("30 % longer (content)", data=Data(source="long")),
        Cell("30 % longer, length_matched", {"discriminator.length_matched": True}, data=Data(source="long")),
    ),
)

NUMBERS = (32, 128, 512, 2048)
SFT = tuple({"learner.lr": lr, "learner.weight_decay": decay} for lr in (3e-4, 1e-3) for decay in (0.0, 0.1))
RLHF = tuple(
    {"learner.lr": lr, "learner.kl_coef": kl, "learner.critic.lr": 1e-3}
    for lr in (5e-5, 1.2e-4)
    for kl in (0.05, 0.2)
)
GAD = tuple(
    {"learner.lr": lr, "discriminator.steps_per_policy_step": steps}
    for lr in (5e-5, 1.2e-4)
    for steps in (1, 3)
)
RLGAF = tuple(
    {"discriminator.weight_decay": decay} | level
    for decay in (0.1, 1.0)
    for level in ({}, PER_TOKEN | _form("prob"))
)


def _few(number: int) -> dict[str, Any]:
    """Settings of a run with `number` demonstrations: no batch is larger than all of them."""
    return {
        "data.max_demonstrations": number,
        "discriminator.batch_size": min(number, 256),
        "learner.sft.batch_size": min(number, 64),
    }


METHODS = (
    ("sft", "sft", SFT),
    ("frozen reward model", "rlhf", RLHF),  # rlhf without preference data
    ("gad", "gad", GAD),
    ("rlgaf", "rlgaf", RLGAF),
)
DEMONSTRATIONS = Grid(
    "demonstrations",
    "How do the methods compare by the number of demonstrations, each with four tuning runs?",
    (
        REFERENCE,
        *(
            Cell(f"{title}, N = {number}", _few(number), method, Data(seed=None), candidates)  # type: ignore[arg-type]
            for number in NUMBERS
            for title, method, candidates in METHODS
        ),
    ),
)

JUDGE: dict[str, Any] = PER_TOKEN | _form("prob") | {"discriminator.weight_decay": 1.0}
GENTLE: dict[str, Any] = JUDGE | {"discriminator.warmup_patience": 3}
"""Warmed up until held-out demonstrations say stop."""
NEAR: dict[str, Any] = {"learner.kl_coef": 0.05}
DROPPED: dict[str, Any] = {"discriminator.token_dropout": 0.4}
SMALL: dict[str, Any] = {"discriminator.lora.rank": 4}
SFT_TOO: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sft, learning rate 1e-3", {"learner.lr": 1e-3}),
    ("sft, learning rate 3e-3", {"learner.lr": 3e-3}),
    ("sft, learning rate 1e-3, weight decay 1", {"learner.lr": 1e-3, "learner.weight_decay": 1.0}),
    ("sft, learning rate 3e-3, adapters of rank 4", {"learner.lr": 3e-3, "learner.lora.rank": 4}),
)
"""What the same thoughts do for the opponent."""
BRAKES: dict[str, Any] = (
    NEAR
    | DROPPED
    | {
        "discriminator.weight_decay": 1.0,
        "discriminator.warmup_patience": 3,
    }
)
"""What holds the judge back, with few demonstrations; `benchmarks.comparison` tries it on real text."""
BOTH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("B, KL .05 and token dropout .4 (C)", PER_TOKEN | _form("prob") | BRAKES),
)
ALL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("default", {}),
    ("per token, prob", PER_TOKEN | _form("prob")),
    ("… and weight decay 1 (A)", JUDGE),
    ("A and warm-up with patience (B)", GENTLE),
    ("B and token dropout .2", GENTLE | {"discriminator.token_dropout": 0.2}),
    ("B and token dropout .4", GENTLE | DROPPED),
    ("B and dropout .3", GENTLE | {"discriminator.dropout": 0.3}),
    ("B and R1 penalty .1", GENTLE | {"discriminator.gradient_penalty": 0.1}),
    ("B and discriminator lr 5e-4", GENTLE | {"discriminator.lr": 5e-4}),
    ("B and one step a turn", GENTLE | ONE_STEP),
    ("B and KL .05", GENTLE | NEAR),
    ("B and adapters of rank 4", GENTLE | SMALL),
    *BOTH,
    ("B, KL .05 and adapters of rank 4 (D)", GENTLE | NEAR | SMALL),
    ("D and token dropout .4 (E)", GENTLE | NEAR | SMALL | DROPPED),
    ("E and an absorbing end", GENTLE | NEAR | SMALL | DROPPED | ABSORBING),
    ("C without A and B", PER_TOKEN | _form("prob") | NEAR | DROPPED),
    ("C with KL .1", GENTLE | DROPPED | {"learner.kl_coef": 0.1}),
    ("C with token dropout .6", GENTLE | NEAR | {"discriminator.token_dropout": 0.6}),
)
FEW = Grid(
    "few",
    "What makes rlgaf better with 32 and 128 demonstrations?",
    (
        REFERENCE,
        *(
            Cell(f"{name}, N = {number}", _few(number) | FINE | settings, "sft", Data(seed=None), seeds=(0,))
            for number in (32, 128)
            for name, settings in SFT_TOO
        ),
        *(
            Cell(
                f"{name}, N = {number}",
                _few(number) | FINE | settings,
                data=Data(seed=None),
                seeds=None if (name, settings) in BOTH else (0,),
            )
            for number in NUMBERS
            for name, settings in (ALL if number < 512 else BOTH)
        ),
    ),
)

FROZEN = Grid(
    "frozen",
    "Does reward rise while the modes are lost, with a frozen discriminator and with one trained along?",
    (
        REFERENCE,
        Cell("co-trained", OFTEN),
        *(
            Cell(f"frozen, KL {kl:g}", OFTEN | FROZEN_JUDGE | {"learner.kl_coef": kl})
            for kl in (0.01, 0.05, 0.2)
        ),
    ),
)

NULL_MEASURES = {"evaluation.extra_measures": "examples/known_modes/measures.py:against_base"}
FROM_BASE = Data(source="base", heldout=4096)
NULL = Grid(
    "null",
    "Demonstrations drawn from the base itself: nothing to find, nowhere to go.",
    (
        Cell("the base and fresh sentences of its own", NULL_MEASURES, data=FROM_BASE, kind="reference"),
        Cell("demonstrations from the base", NULL_MEASURES, data=FROM_BASE),
        Cell("… and health.pause_policy", NULL_MEASURES | PAUSES, data=FROM_BASE),
        Cell("8,192 of them", NULL_MEASURES, data=replace(FROM_BASE, train=8192)),
    ),
)

GUMBEL = Grid(
    "gumbel",
    "What does the Gumbel-Softmax update do to modes and stability, alone and beside the policy gradient?",
    (
        REFERENCE,
        Cell("policy gradient alone", OFTEN),
        *(
            Cell(
                f"Gumbel-Softmax alone, {schedule}",
                OFTEN | GUMBEL_ALONE | settings,
            )
            for schedule, settings in (
                ("tau 1 to .5", {}),
                ("tau 1", {"learner.gumbel.schedule": "constant"}),
                ("tau .5", {"learner.gumbel.schedule": "constant", "learner.gumbel.tau_start": 0.5}),
            )
        ),
        Cell("both, equal weights", OFTEN | {"learner.gumbel.weight": 1.0}),
        Cell("both, Gumbel-Softmax .1", OFTEN | {"learner.gumbel.weight": 0.1}),
    ),
)

GRIDS = {
    grid.name: grid
    for grid in (DEFAULT, REWARDS, ALARMS, ARTEFACTS, DEMONSTRATIONS, FEW, FROZEN, NULL, GUMBEL)
}
"""Every grid by name."""
