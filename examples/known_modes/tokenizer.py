"""The language's tokenizers: a word a token, or with pieces of two words, so that a text has two spellings.

* Form "plain": 32 tokens, `decode` and `encode` undo each other.
* Form "merged": 16 more tokens for a slot of family c and the d that follows it (`c0 d2`). `encode` always
  takes the merged piece; a policy may sample either spelling, and the text is the same. Sampled ids then
  differ from the canonical ones, in about two sentences of three when both spellings are equally likely.

A prompt tells nothing, and the tokenizer sees to it: everything written as `#` and digits is erased before
tokens are looked for. Row numbers `#0`, `#1`, … are different prompts to the splits, which go by text, and
the same prompt, the begin token alone, to policy and discriminator.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np

from examples.known_modes.language import (
    BEGIN,
    END,
    FAMILY_SIZE,
    SLOTS,
    UNKNOWN,
    VOCABULARY,
    WORDS,
    Sentence,
    tokens_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Form = Literal["plain", "merged"]
_SPACE = "▁"
_C, _D = SLOTS, SLOTS + FAMILY_SIZE
CONTEXT = 64


def vocabulary_size(form: Form) -> int:
    """Tokens of a form."""
    return VOCABULARY + (FAMILY_SIZE**2 if form == "merged" else 0)


def merged(c: int, d: int) -> int:
    """Id of the piece of two slot tokens, the first of family c, the second of family d."""
    return VOCABULARY + FAMILY_SIZE * (c - _C) + (d - _D)


def spell(
    sentence: Sentence, form: Form, rng: np.random.Generator | None = None, split: float = 0.5
) -> list[int]:
    """Token ids of a sentence with its end token; a pair that could be merged stays two tokens with
    probability `split`.

    Without `rng` every pair is merged: the canonical spelling.
    """
    tokens = tokens_of(sentence)
    if form == "plain":
        return tokens
    out: list[int] = []
    for token in tokens:
        pair = bool(out) and out[-1] in range(_C, _D) and token in range(_D, _D + FAMILY_SIZE)
        if pair and (rng is None or rng.random() >= split):
            out[-1] = merged(out[-1], token)
        else:
            out.append(token)
    return out


def build_tokenizer(form: Form) -> "PreTrainedTokenizerFast":
    """A fast tokenizer. All pieces weigh the same, so the spelling with the fewest pieces is canonical."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = (END, BEGIN, UNKNOWN)
    pieces = [word if token in special else _SPACE + word for token, word in enumerate(WORDS)]
    if form == "merged":
        pieces += [pieces[c] + pieces[d] for c in range(_C, _D) for d in range(_D, _D + FAMILY_SIZE)]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace(Regex("#[0-9]+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{WORDS[BEGIN]} $A", special_tokens=[(WORDS[BEGIN], BEGIN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=WORDS[BEGIN],
        eos_token=WORDS[END],
        pad_token=WORDS[END],
        unk_token=WORDS[UNKNOWN],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
