"""What every contender of a benchmark is given: the same prompts, responses, model, dtype and threads.

The workload is one JSON file, so contenders may run under other interpreters and need only the standard
library to read it.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

WORDS = (
    *("a", "the", "of", "and", "in", "with", "for", "from", "library", "program", "server", "client", "user"),
    *("file", "network", "small", "fast", "simple", "text", "data", "tool", "system", "that", "provides"),
    *(
        "reads",
        "writes",
        "image",
        "window",
        "command",
        "line",
        "format",
        "package",
        "support",
        "many",
        "other",
    ),
    *("language", "code", "build", "test", "time", "can", "be", "used", "to", "it", "is", "an", "version"),
)


@dataclass(frozen=True)
class Workload:
    """Prompts with their token ids, `group_size` responses of exactly `response_tokens` tokens for each."""

    model: str
    dtype: Literal["float32", "bfloat16"]
    threads: int
    prompts: list[str]
    prompt_ids: list[list[int]]
    group_size: int
    response_tokens: int
    responses: list[list[list[int]]]
    """Fixed random responses, for the contenders that only learn: [prompts][group_size][response_tokens]."""
    micro_batch_tokens: int
    """Tokens in one of the learner's and the bare loops' forward passes."""
    trl_micro_batch: int
    """Sequences in one of TRL's forward passes."""
    scratch: str
    """Folder for temporary files."""

    @property
    def max_model_len(self) -> int:
        return max(map(len, self.prompt_ids)) + self.response_tokens

    @property
    def samples(self) -> int:
        return len(self.prompts) * self.group_size

    @property
    def new_tokens(self) -> int:
        return self.samples * self.response_tokens

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path | str) -> "Workload":
        return cls(**json.loads(Path(path).read_text()))


def choose_prompts(
    texts: list[str], tokenizer: Any, count: int, tokens: int
) -> tuple[list[str], list[list[int]]]:
    """The first `count` texts of about `tokens` tokens (a quarter more or less), and their ids.

    Raises SystemExit when there are not enough of them.
    """
    chosen: list[str] = []
    ids: list[list[int]] = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if 0.75 * tokens <= len(encoded) <= 1.25 * tokens:
            chosen.append(text)
            ids.append(encoded)
            if len(chosen) == count:
                return chosen, ids
    raise SystemExit(
        f"only {len(chosen)} of {len(texts)} prompts have {tokens} tokens +- 25 %, {count} are needed; "
        "set --prompt-tokens or --prompts, or use --synthetic-prompts"
    )


def prompts_of(path: Path, column: str, tokenizer: Any, template: str) -> list[str]:
    """Prompts of a JSONL file, put into `template` and, where the tokenizer has one, its chat template."""
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there; fetch it with `rlgaf assets debian`, or use --synthetic-prompts"
        )
    rows = [json.loads(line)[column] for line in path.read_text().splitlines() if line.strip()]
    texts = [template.format(prompt=row) for row in rows]
    if not tokenizer.chat_template:
        return texts
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in texts
    ]


def synthetic_prompts(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Random words, each text a little shorter or longer than `tokens` tokens."""
    draw = random.Random(0)
    texts = []
    for _ in range(count):
        wanted = draw.uniform(0.85, 1.15) * tokens
        text = draw.choice(WORDS)
        while len(tokenizer.encode(text, add_special_tokens=False)) < wanted:
            text += " " + draw.choice(WORDS)
        texts.append(text)
    return texts


def random_responses(tokenizer: Any, prompts: int, group_size: int, length: int) -> list[list[list[int]]]:
    """Uniform random tokens, no special ones; their number is all that matters to a learner's speed."""
    draw = random.Random(1)
    special = set(tokenizer.all_special_ids)
    allowed = [i for i in range(len(tokenizer)) if i not in special]
    return [[draw.choices(allowed, k=length) for _ in range(group_size)] for _ in range(prompts)]
