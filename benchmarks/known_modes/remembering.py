"""The canonical path with a memory: a discriminator of a few thousand weights would spend most of its time in
the tokenizer, which is given the same sentences again and again.
"""

from discriminator.canonical import Canonicaliser, Encoded


class Remembering(Canonicaliser):
    """A canonicaliser that encodes a text once; otherwise the one it is made from.

    What it gives is shared and must not be changed.
    """

    def __init__(self, whole: Canonicaliser) -> None:
        self.__dict__.update(whole.__dict__)
        self._responses: dict[tuple[str, bool], Encoded] = {}
        self._prompts: dict[str, list[int]] = {}

    def encode(self, prompt_text: str, response_text: str, *, complete: bool) -> Encoded:
        key = (response_text, complete)
        known = self._responses.get(key)
        if known is None:
            known = super().encode(prompt_text, response_text, complete=complete)
            self._responses[key] = known
        return Encoded(self.encode_prompt(prompt_text), known.response_ids, known.spans, known.complete)

    def encode_prompt(self, prompt_text: str) -> list[int]:
        known = self._prompts.get(prompt_text)
        if known is None:
            known = self._prompts[prompt_text] = super().encode_prompt(prompt_text)
        return known
