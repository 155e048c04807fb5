"""Prompts as the policy sees them: text, token ids, and the token that ends a response.

Rendered text is the only form of a prompt that travels further, and `Renderer.encode` the only way from it to
ids: chat text brings its own special tokens and gets no others; plain text gets exactly the prefix (usually
BOS, often nothing) that the tokenizer itself puts before a text, and never a suffix, since the response
continues the prompt.

Everything here runs before any model weights are read, so a wrong name, a missing chat template, a tokenizer
without EOS or a prompt budget beyond the model's context stops the run early.
"""

import inspect
import json
from datetime import datetime, time
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any

from rollout.config import DataConfig, PolicyConfig
from rollout.hub import hub_problem
from rollout.rows import DataError


def load_tokenizer(policy: PolicyConfig) -> Any:
    """Tokenizer of `policy.model`, from a local folder or the hub. Raises DataError when there is none."""
    from transformers import AutoTokenizer, PreTrainedConfig  # seconds to import; simple errors come first

    if not policy.model:
        raise DataError("policy.model is not set: name a local model folder or a hub model")
    folder = Path(policy.model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            f"policy.model = {policy.model!r}: the folder holds no config.json, so it is no model"
        )
    if not folder.is_dir() and (policy.model.startswith((".", "/", "~")) or policy.model.count("/") > 1):
        raise DataError(
            f"policy.model = {policy.model!r}: no such folder; `rlgaf assets` fetches the models of "
            "the examples"
        )
    problem = None if folder.is_dir() else hub_problem(policy.model)
    name, offline = folder if folder.is_dir() else policy.model, problem is not None
    try:
        said, _ = PreTrainedConfig.get_config_dict(name, local_files_only=offline)
        _check_type(policy, said)
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=policy.trust_remote_code, local_files_only=offline
        )
    except DataError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first_line = problem or (str(error).splitlines() or [""])[0]
        where = "" if folder.is_dir() else "it is no local folder, is not cached, and the hub gives "
        raise DataError(
            f"policy.model = {policy.model!r}: no tokenizer could be loaded ({where}{first_line}); "
            "check the name "
            "and the connection, or run `rlgaf assets`, which fetches the models of the examples"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"policy.model = {policy.model!r}: has no fast tokenizer (tokenizer.json), which rlgaf needs"
        )
    return tokenizer


def _check_type(policy: PolicyConfig, said: dict[str, Any]) -> None:
    """DataError when a model's config.json, `said`, is of no type that transformers knows."""
    from transformers import CONFIG_MAPPING, __version__

    kind = said.get("model_type")
    if kind not in CONFIG_MAPPING and not (policy.trust_remote_code and said.get("auto_map")):
        raise DataError(
            f"policy.model = {policy.model!r}: its config.json "
            + ("has no model_type" if kind is None else f"has model_type {kind!r}")
            + f", by which transformers {__version__} knows no class; name another model, or set "
            "trust_remote_code for one that brings its own code"
        )


def end_of_response_id(tokenizer: Any, policy: PolicyConfig) -> int:
    """Id of the token that ends a response: the EOS, or the one token spelled `policy.end_of_response`."""
    if not policy.end_of_response:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of {policy.model!r} has no EOS token; set policy.end_of_response to a "
                "token that ends "
                'a response, e.g. "\\n"'
            )
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_added_vocab()
    if policy.end_of_response in vocabulary:
        return int(vocabulary[policy.end_of_response])
    ids = tokenizer(policy.end_of_response, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or tokenizer.decode(ids) != policy.end_of_response:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        singles = [t for t in ("\n", "\n\n") if len(tokenizer(t, add_special_tokens=False)["input_ids"]) == 1]
        usable = [repr(t) for t in (tokenizer.eos_token, *singles) if t is not None]
        raise DataError(
            f"policy.end_of_response = {policy.end_of_response!r} is {len(ids)} tokens ({pieces}) for the "
            f"tokenizer of {policy.model!r}; it must be exactly one"
            + (f", such as {' or '.join(usable)}" if usable else "")
        )
    return int(ids[0])


def eos_ids(shape: Any, model: str, tokenizer: Any) -> set[int]:
    """Every EOS of a model with the configuration `shape`, at which vLLM stops: the tokenizer's, and those of
    the generation configuration, or where there is none of the model's own."""
    from transformers import GenerationConfig

    try:
        said = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no generation_config.json
        said = shape.get_text_config().eos_token_id
    several = said if isinstance(said, list) else [said]
    return {int(token) for token in [*several, tokenizer.eos_token_id] if token is not None}


class Renderer:
    """Prompt → text → ids for one tokenizer.

    >>> renderer = Renderer(load_tokenizer(policy), data, policy)
    >>> ids = renderer.encode(renderer.render("Once upon a time"))

    `render` takes the `prompt` column of DEMONSTRATION_SCHEMA: the text itself (format "text"), or JSON of a
    string or of a list of messages (format "chat").
    """

    def __init__(self, tokenizer: Any, data: DataConfig, policy: PolicyConfig) -> None:
        """Raises DataError when the template, the chat template or the end token cannot be used."""
        self.tokenizer = tokenizer
        self.end_id = end_of_response_id(tokenizer, policy)
        self._data = data
        self._model = policy.model
        self._check_template()
        self._variables = self._template_variables()
        self.specials = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        if data.prompt_format == "chat" and not tokenizer.chat_template:
            raise DataError(
                f'data.prompt_format = "chat", but the tokenizer of {policy.model!r} has no chat '
                "template; use "
                'data.prompt_format = "text" with data.prompt_template, or put a chat_template.jinja '
                "into the model folder"
            )
        for name in ("system_prompt", "template_variables"):
            if data.prompt_format == "text" and getattr(data, name):
                raise DataError(
                    f'data.{name} needs data.prompt_format = "chat"; for text use data.prompt_template'
                )

    def render(self, prompt: str) -> str:
        """Text of one prompt. Raises DataError when the chat template refuses or fails."""
        if self._data.prompt_format == "text":
            return self._data.prompt_template.format(prompt=prompt)
        messages = json.loads(prompt)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": self._data.prompt_template.format(prompt=messages)}]
        if self._data.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._data.system_prompt}, *messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self._variables
                )
            )
        except Exception as error:  # a template is a program of the model's author: it can raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"the chat template of {self._model!r} refuses the prompt: {reason}") from error

    def shown(self, prompt: str) -> str:
        """A prompt as a reader of samples wants it: without the template; of a chat, its last message."""
        if self._data.prompt_format == "text":
            return prompt
        messages = json.loads(prompt)
        return messages if isinstance(messages, str) else str(messages[-1]["content"])

    def encode(self, text: str) -> list[int]:
        """Prompt ids of rendered text, with the tokenizer's prefix (BOS) for plain text."""
        return self._with_prefix(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def check_lengths(self, texts: list[str]) -> list[str | None]:
        """For every rendered text None, or why it is no usable prompt: no token at all, or too many."""
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        complaints: list[str | None] = []
        for ids in encoded:
            tokens = len(self._with_prefix(ids))
            if tokens == 0:
                complaints.append("prompt is empty: not one token to condition on")
            elif tokens > self._data.max_prompt_tokens:
                limit = self._data.max_prompt_tokens
                complaints.append(f"prompt is too long: {tokens} tokens, data.max_prompt_tokens is {limit}")
            else:
                complaints.append(None)
        return complaints

    @cached_property
    def prefix(self) -> list[int]:
        """Ids put before plain text: what the tokenizer itself puts there (BOS or nothing). Chat text has
        its own.
        """
        if self._data.prompt_format == "chat":
            return []
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        return list(full[: starts[0]]) if starts else []

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """The ids with the prefix before them, once: a template may spell it itself."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside the messages; the date is the run's, not that of the moment."""
        chosen = self._data.template_variables
        own = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages", "strftime_now"}
        if taken := sorted(own.intersection(chosen) - {"tools", "documents"}):
            raise DataError(f"data.template_variables: {taken[0]} is set by rlgaf itself; leave it out")
        if self._data.today is None:
            return dict(chosen)
        return chosen | {"strftime_now": datetime.combine(self._data.today, time()).strftime}

    def _check_template(self) -> None:
        template = self._data.prompt_template
        try:
            fields = [field for field in Formatter().parse(template) if field[1] is not None]
        except ValueError as error:
            raise DataError(
                f"data.prompt_template = {template!r}: {error}; write literal braces as {{{{ and }}}}"
            ) from error
        if {field[1:] for field in fields} != {("prompt", "", None)}:
            raise DataError(
                f"data.prompt_template = {template!r} must use {{prompt}}, as it stands, and no other field; "
                "write literal braces as {{ and }}"
            )
