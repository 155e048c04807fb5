"""One spelling for both sides: demonstrations and rollouts reach the discriminator through this module only.

Invariant: the token ids are a function of (prompt text, response text, complete) and of nothing else, so
identical text gives identical ids whichever side it comes from. A response is normalised (Unicode,
whitespace), encoded apart from its prompt with the discriminator's own tokenizer, cut at one limit for both
sides, and ends with EOS exactly when it is complete: a rollout that stopped by itself, a demonstration that
was not cut. Text that no token within the limit can reach is cut off before it is read, so that an encoding's
time and memory have a bound. Several threads may encode at once.

Each canonical token remembers the characters it covers in the *raw* response text; `spread_to_sampled`
carries per-token numbers from there to the tokens that were sampled.
"""

import bisect
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from discriminator.config import CanonicalConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

JUDGED_COLUMNS = ("prompt_id", "prompt_text", "response_text", "finish_reason")
"""What the discriminator reads of a rollout or a prepared demonstration; both tables have these columns."""

MEMORY_TOKENS = 2**18
"""Tokens of responses (and as many of prompts) whose encoding is remembered; about 30 MB each. A token counts
for `MEMORY_CHARACTERS` at the least."""
MEMORY_CHARACTERS = 16

_BLANKS = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n{3,}")
_LINE_ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@dataclass(frozen=True)
class NormalText:
    """Normalised text; character i came from raw characters starts[i] up to ends[i] (ends do not
    decrease)."""

    text: str
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Encoded:
    """One canonical (prompt, response). Spans are in raw response characters, one per response id.

    `complete` tells whether the response ends with EOS; its EOS has the empty span at the end of the raw
    text.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    spans: list[Span]
    complete: bool


class _Spelling(NamedTuple):
    """What a text was encoded to."""

    ids: list[int]
    spans: list[Span]
    complete: bool


class _Memory:
    """Spellings of texts (complete or cut), `room` tokens of them: the least recently used ones make place.

    A step's rollouts are read by its evaluation, by each of its updates and by the scorer, and held-out
    demonstrations at every step; without a memory a small discriminator spends most of its time here.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._held: OrderedDict[tuple[str, bool], _Spelling] = OrderedDict()
        self._tokens = 0

    def get(self, text: str, complete: bool, make: Callable[[], _Spelling]) -> _Spelling:
        """The spelling of a text, made where it is not held. It is shared and must not be changed."""
        key = text, complete
        known = self._held.get(key)
        if known is not None:
            self._held.move_to_end(key)
            return known
        made = self._held[key] = make()
        self._tokens += _weight(text, made)
        while self._tokens > self.room:
            (oldest, _), spelling = self._held.popitem(last=False)
            self._tokens -= _weight(oldest, spelling)
        return made


def _weight(text: str, spelling: _Spelling) -> int:
    return max(len(spelling.ids), len(text) // MEMORY_CHARACTERS)


def normalise(raw: str, config: CanonicalConfig, *, complete: bool = True) -> NormalText:
    """Normalised response text with its map back to the raw characters.

    A cut response additionally loses trailing replacement characters: they are bytes of a character that the
    limit split, not text.
    """
    chars, starts, ends = (
        _compose(raw)
        if config.unicode == "nfc"
        else (list(raw), [*range(len(raw))], [*range(1, len(raw) + 1)])
    )
    if not complete:
        while chars and chars[-1] == "\ufffd":
            chars.pop()
        starts, ends = starts[: len(chars)], ends[: len(chars)]
    out = NormalText("".join(chars), starts, ends)
    if config.whitespace == "off":
        return out
    out = _substitute(out, re.compile(r"\r\n"), "\n")
    out = _substitute(out, re.compile(f"[{_LINE_ENDS}]"), "\n")
    if config.whitespace == "collapse":
        out = _substitute(out, _BLANKS, " ")
        out = _substitute(out, re.compile(r" ?\n ?"), "\n")
        out = _substitute(out, _EMPTY_LINES, "\n\n")
    left = len(out.text) - len(out.text.lstrip())
    right = len(out.text.rstrip())
    return NormalText(out.text[left:right], out.starts[left:right], out.ends[left:right])


def _compose(raw: str) -> tuple[list[str], list[int], list[int]]:
    """NFC with character map. Text is split where no composition can reach across, and each piece composed
    alone."""
    if unicodedata.is_normalized("NFC", raw):
        return list(raw), [*range(len(raw))], [*range(1, len(raw) + 1)]
    chars: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    begin = 0
    for end in range(1, len(raw) + 1):
        if end < len(raw) and _joins_backwards(raw[end]):
            continue
        composed = unicodedata.normalize("NFC", raw[begin:end])
        chars.extend(composed)
        if composed == raw[begin:end]:
            starts.extend(range(begin, end))
            ends.extend(range(begin + 1, end + 1))
        else:
            starts.extend([begin] * len(composed))
            ends.extend([end] * len(composed))
        begin = end
    return chars, starts, ends


def _joins_backwards(char: str) -> bool:
    """Whether NFC may merge or reorder this character with those before it: marks, and Hangul vowels and
    finals."""
    return unicodedata.category(char)[0] == "M" or 0x1160 <= ord(char) <= 0x11FF


def _substitute(text: NormalText, pattern: re.Pattern[str], replacement: str) -> NormalText:
    """Replace matches; each character of a replacement came from the whole match."""
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    position = 0
    for match in pattern.finditer(text.text):
        begin, end = match.span()
        pieces += [text.text[position:begin], replacement]
        starts += text.starts[position:begin] + [text.starts[begin]] * len(replacement)
        ends += text.ends[position:begin] + [text.ends[end - 1]] * len(replacement)
        position = end
    if position == 0:
        return text
    pieces.append(text.text[position:])
    return NormalText("".join(pieces), starts + text.starts[position:], ends + text.ends[position:])


class Canonicaliser:
    """Encodes (prompt text, response text, complete) for the discriminator.

        canonical = Canonicaliser(tokenizer, config.canonical, context=2048)
        canonical.encode("say cat: ", "the cat sat", complete=True).response_ids[-1] == canonical.eos_id

    Args:
        tokenizer: the discriminator's tokenizer; a fast one, since spans come from its offsets.
        config: normalisation and limits.
        context: positions of the body; prompt and response limits always fit into it.
        encoder: the body is bidirectional: the prompt then ends with the separator token.

    Raises:
        ValueError: slow tokenizer, no end token, or limits that leave no room for the prompt.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        config: CanonicalConfig,
        *,
        context: int,
        encoder: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{tokenizer.name_or_path}: the discriminator needs a fast tokenizer (character offsets)"
            )
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: the discriminator's tokenizer has neither EOS nor SEP token; "
                "name a discriminator.model that has one"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.eos_id = int(eos)
        self.max_response = min(config.max_response_tokens or context // 2, context - 2)
        self.max_prompt = min(config.max_prompt_tokens or context, context - self.max_response)
        if self.max_response < 1 or self.max_prompt < 2:
            raise ValueError(
                f"discriminator.canonical leaves {self.max_prompt} prompt and {self.max_response} response "
                f"tokens of a context of {context}"
            )
        self._suffix = [int(tokenizer.sep_token_id)] if encoder and tokenizer.sep_token_id is not None else []
        self._prefix = self._start_tokens()
        longest = max(map(len, tokenizer.get_vocab()))
        self._response_room = (self.max_response + 1) * longest
        self._prompt_room = (self.max_prompt + 1) * longest
        self._responses = _Memory(MEMORY_TOKENS)
        self._prompts = _Memory(MEMORY_TOKENS)
        # A tokenizer's settings change with each call: prompts read special tokens, responses do not.
        self._lock = threading.Lock()

    def encode(self, prompt_text: str, response_text: str, *, complete: bool) -> Encoded:
        """Canonical ids and spans. `complete` False: the response was cut, and gets no EOS.

        A response without any text is judged as the empty response: it consists of EOS alone, cut or not.
        """
        text = response_text[: self._response_room]
        complete = complete and len(text) == len(response_text)
        with self._lock:
            ids, spans, whole = self._responses.get(text, complete, lambda: self._spell(text, complete))
        return Encoded(self.encode_prompt(prompt_text), ids, spans, whole)

    def encode_prompt(self, prompt_text: str) -> list[int]:
        """Ids of a rendered prompt, special tokens in its text included; the last ones when it is too
        long."""
        text = prompt_text[-self._prompt_room :]
        with self._lock:
            return self._prompts.get(text, True, lambda: self._spell_prompt(text)).ids

    def encode_table(self, table: pa.Table) -> list[Encoded]:
        """One `Encoded` per row of a table with `JUDGED_COLUMNS`."""
        columns = (table[name].to_pylist() for name in ("prompt_text", "response_text", "finish_reason"))
        return [
            self.encode(prompt, response, complete=finish == "stop")
            for prompt, response, finish in zip(*columns, strict=True)
        ]

    def _spell(self, response_text: str, complete: bool) -> _Spelling:
        normal = normalise(response_text, self.config, complete=complete)
        coded = self.tokenizer(
            normal.text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
        )
        ids = [int(i) for i in coded["input_ids"]]
        length = len(response_text)
        spans = [
            (normal.starts[begin], normal.ends[end - 1]) if end > begin else (length, length)
            for begin, end in coded["offset_mapping"]
        ]
        if (complete and len(ids) < self.max_response) or not ids:
            ids.append(self.eos_id)
            spans.append((length, length))
            complete = True
        else:
            complete = False
        return _Spelling(ids[: self.max_response], spans[: self.max_response], complete)

    def _spell_prompt(self, prompt_text: str) -> _Spelling:
        ids = self.tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        if self._prefix and list(ids[: len(self._prefix)]) == self._prefix:
            ids = ids[len(self._prefix) :]
        room = self.max_prompt - len(self._prefix) - len(self._suffix)
        whole = self._prefix + [int(i) for i in ids][-room:] + self._suffix
        return _Spelling(whole or [self.eos_id], [], True)

    def _start_tokens(self) -> list[int]:
        """BOS or CLS, where the tokenizer puts one in front by itself."""
        automatic = self.tokenizer("", add_special_tokens=True)["input_ids"]
        starts = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        return [int(automatic[0])] if automatic and automatic[0] in starts else []


def spread_to_sampled(
    values: Sequence[float] | NDArray[np.floating], spans: Sequence[Span], token_ends: Sequence[int]
) -> NDArray[np.float64]:
    """Carry one number per canonical token to the sampled tokens; the sum is preserved.

    Args:
        values: one per canonical token.
        spans: raw-text span of each canonical token.
        token_ends: per sampled token, characters of the raw text that are complete after it (not decreasing).

    Returns:
        float64 of len(token_ends): each value stands at the first sampled token after which its span is
        complete. An empty span (EOS) belongs to the last sampled token, and so does a span that none
        completes.

    Raises:
        ValueError: lengths disagree, or there is no sampled token to receive the values.
    """
    if len(values) != len(spans):
        raise ValueError(f"{len(values)} values for {len(spans)} spans")
    if not len(token_ends):
        raise ValueError("a response without sampled tokens cannot receive rewards")
    out = np.zeros(len(token_ends), dtype=np.float64)
    last = len(token_ends) - 1
    for value, (begin, end) in zip(values, spans, strict=True):
        out[min(bisect.bisect_left(token_ends, end), last) if end > begin else last] += value
    return out


def prepare_demonstrations(
    table: pa.Table,
    policy_tokenizer: "PreTrainedTokenizerBase",
    config: CanonicalConfig,
    *,
    max_tokens: int,
) -> pa.Table:
    """Demonstrations as the policy could have written them: cut to the rollouts' token limit and marked.

    Args:
        table: columns prompt_id, prompt_text (rendered as for rollouts) and response_text.
        policy_tokenizer: the limit counts the policy's tokens.
        config: normalisation; it comes first, so that stripped whitespace does not use up the limit.
        max_tokens: most tokens of a rollout, its end token included.

    Returns:
        `JUDGED_COLUMNS`; finish_reason is "length" where text and end token do not fit, else "stop".

    Raises:
        ValueError: a demonstration without text, named by its prompt.
    """
    texts, reasons = [], []
    for prompt_id, raw in zip(
        table["prompt_id"].to_pylist(), table["response_text"].to_pylist(), strict=True
    ):
        text = normalise(raw, config).text
        if not text:
            raise ValueError(f"the demonstration of prompt {prompt_id} has no text")
        ids = policy_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        cut = len(ids) + 1 > max_tokens
        if cut:
            text = str(policy_tokenizer.decode(ids[:max_tokens], skip_special_tokens=True))
        texts.append(text)
        reasons.append("length" if cut else "stop")
    return pa.table(
        {
            "prompt_id": table["prompt_id"],
            "prompt_text": table["prompt_text"],
            "response_text": pa.array(texts, pa.string()),
            "finish_reason": pa.array(reasons, pa.string()),
        }
    )
