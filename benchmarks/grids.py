"""The declared grids: which runs answer which question. Data only; `benchmarks/README.md` says how to run
them.

Settings stand over `examples/known_modes/known-modes.toml`. Candidates are all the tuning there is: as many
for every method of a grid, chosen among by the selection split, every one of them kept.
"""

from typing import Any

from benchmarks.known_modes.artefacts import GUARD_OFF
from benchmarks.known_modes.cells import Cell, Data, Grid

PER_TOKEN: dict[str, Any] = {"discriminator.level": "token"}
"""Discounted by .25, the default at this level."""
BRADLEY_TERRY: dict[str, Any] = {"discriminator.loss": "bradley_terry"}
REFERENCE = Cell("base and fresh demonstrations", kind="reference")


def _form(name: str) -> dict[str, Any]:
    """A reward form, with the discriminator's loss that it needs."""
    losses = BRADLEY_TERRY if name in ("bradley_terry", "relativistic") else {}
    return {"discriminator.reward.form": name, **losses}


DEFAULT = Grid(
    "default",
    "Do the default settings keep all modes, with 2,048 demonstrations?",
    (REFERENCE, Cell("rlgaf")),
)

FORMS = ("neg_log_one_minus_d", "prob", "logit", "log_d", "bradley_terry", "relativistic")
REWARDS = Grid(
    "rewards",
    "Which reward forms keep modes, for whole sequences and per token? Does an alarm come before a collapse?",
    (
        *(Cell(f"{name}, sequence", _form(name)) for name in FORMS),
        *(Cell(f"{name}, per token", _form(name) | PER_TOKEN) for name in FORMS),
        Cell("logit, per token, gamma 1", _form("logit") | PER_TOKEN | {"learner.gamma": 1.0}),
        Cell(
            "equal learning rates, one discriminator step",
            _form("logit")
            | {
                "discriminator.lr": 1.2e-4,
                "discriminator.steps_per_policy_step": 1,
                "discriminator.health.enabled": False,
            },
        ),
    ),
)

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
        *(cell for plant in SPELLING for cell in _artefact(plant)),
        Cell("trailing word: audit", data=Data(plant="trailing word"), kind="audit"),
        Cell("trailing word (content)", data=Data(plant="trailing word")),
        Cell("30 % longer (content)", data=Data(source="long")),
        Cell("30 % longer, length_matched", {"discriminator.length_matched": True}, data=Data(source="long")),
    ),
)

NUMBERS = (32, 128, 512, 2048)
SFT = tuple({"learner.lr": lr, "learner.weight_decay": decay} for lr in (3e-4, 1e-3) for decay in (0.0, 0.1))
RLHF = tuple({"learner.lr": lr, "learner.kl_coef": kl} for lr in (5e-5, 1.2e-4) for kl in (0.05, 0.2))
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
    batch = min(number, 64)
    return {
        "data.max_demonstrations": number,
        "discriminator.batch_size": batch,
        "learner.sft.batch_size": batch,
    }


METHODS = (("sft", SFT), ("rlhf", RLHF), ("gad", GAD), ("rlgaf", RLGAF))
DEMONSTRATIONS = Grid(
    "demonstrations",
    "How do the methods compare by the number of demonstrations, each with four tuning runs?",
    tuple(
        Cell(f"{method}, N = {number}", _few(number), method, Data(seed=None), candidates)  # type: ignore[arg-type]
        for number in NUMBERS
        for method, candidates in METHODS
    ),
)

FEW = Grid(
    "few",
    "What makes rlgaf better with 32 and 128 demonstrations?",
    tuple(
        Cell(f"{name}, N = {number}", _few(number) | settings, data=Data(seed=None))
        for number in (32, 128)
        for name, settings in (
            ("default", {}),
            ("weight decay 1", {"discriminator.weight_decay": 1.0}),
            ("weight decay 3", {"discriminator.weight_decay": 3.0}),
            ("dropout .3", {"discriminator.dropout": 0.3}),
            ("label smoothing .3", {"discriminator.label_smoothing": 0.3}),
            ("R1 penalty .1", {"discriminator.gradient_penalty": 0.1}),
            ("discriminator lr 5e-4", {"discriminator.lr": 5e-4}),
            ("KL .05", {"learner.kl_coef": 0.05}),
            ("per token, prob", PER_TOKEN | _form("prob")),
        )
    ),
)

OFTEN = {"evaluation.every": 15, "evaluation.prompts": 512}
"""Monitors look at evaluations; these come often enough to see a collapse begin."""
FROZEN = Grid(
    "frozen",
    "Does reward rise while the modes are lost, with a frozen discriminator and with one trained along?",
    (
        Cell("co-trained", OFTEN),
        *(
            Cell(
                f"frozen, KL {kl:g}",
                OFTEN
                | {
                    "discriminator.frozen": True,
                    "discriminator.warmup_max_steps": 500,
                    "discriminator.warmup_accuracy": 1.0,
                    "discriminator.warmup_patience": 5,
                    "learner.kl_coef": kl,
                },
            )
            for kl in (0.01, 0.05, 0.2)
        ),
    ),
)

NULL_MEASURES = "examples/known_modes/measures.py:against_base"
NULL = Grid(
    "null",
    "Demonstrations drawn from the base itself: nothing to find, nowhere to go.",
    (
        Cell(
            "demonstrations from the base",
            {"evaluation.extra_measures": NULL_MEASURES},
            data=Data(source="base", heldout=4096),
        ),
    ),
)

GUMBEL = Grid(
    "gumbel",
    "What does the Gumbel-Softmax update do to modes and stability, alone and beside the policy gradient?",
    (
        Cell("policy gradient alone"),
        *(
            Cell(
                f"Gumbel-Softmax alone, {schedule}",
                {"learner.gumbel.weight": 1.0, "learner.gumbel.policy_gradient_weight": 0.0} | settings,
            )
            for schedule, settings in (
                ("tau 1 to .5", {}),
                ("tau 1", {"learner.gumbel.schedule": "constant"}),
                ("tau .5", {"learner.gumbel.schedule": "constant", "learner.gumbel.tau_start": 0.5}),
            )
        ),
        Cell("both, equal weights", {"learner.gumbel.weight": 1.0}),
        Cell("both, Gumbel-Softmax .1", {"learner.gumbel.weight": 0.1}),
    ),
)

GRIDS = {grid.name: grid for grid in (DEFAULT, REWARDS, ARTEFACTS, DEMONSTRATIONS, FEW, FROZEN, NULL, GUMBEL)}
"""Every grid by name."""
