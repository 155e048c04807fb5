"""Credentials belong to the environment: a URL of a configuration holds none, and no error repeats one.

A configuration is written to the run's folder, to exported models, to trackers and to the line that submits a
job; libraries repeat URLs and headers in their errors.
"""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator

_NAMES = r"(?:token|secret|passw(?:or)?d|pwd|sig(?:nature)?|credential|auth|((api|access|account)_?)?key)"
_USER = re.compile(
    r"(\w:/{1,2})([^/?#\s\"'@]{1,256}:(?!\d{1,5}(?:[/?#]|$))[^\s\"']{0,512}|[^/?#\s\"'@]{0,256})@"
)
"""What stands before a host: `user@`, `user:password@` (which may hold slashes), `token@`. One slash is what
a file name makes of two."""
_PARAMETER = re.compile(rf"([?&;#](?:[\w.-]*[_.-]|aws)?{_NAMES}(?:_?id)?=)[^&;#\s\"']+", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|_KEY|_KEY_ID)$")
SHORTEST = 8
"""Characters that a variable's value must have to be taken for a secret."""


class Redacted(Exception):
    """Base of errors whose message is shown: whatever a library put into it, credentials are blanked."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


def redacted(text: str) -> str:
    """The text without credentials in URLs and without the values of this process's secret variables."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, f"<{name}>")
    return _PARAMETER.sub(r"\1***", _USER.sub(r"\1***@", text))


def holds_credentials(text: str) -> bool:
    """Whether a URL in the text has a user, a password or a parameter that is named like a secret. The user
    of HDFS, which is no secret, may stand."""
    users = [user for user in _USER.finditer(text) if not (_is_hdfs(text, user) and ":" not in user[2])]
    return bool(users or ("://" in text and _PARAMETER.search(text)))


def _is_hdfs(text: str, user: re.Match[str]) -> bool:
    return text[: user.end(1)].lower().endswith("hdfs://")


def fields_with_credentials(said: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the values, in nested tables and lists, that hold credentials."""
    if isinstance(said, dict):
        for name, value in said.items():
            yield from fields_with_credentials(value, f"{where}.{name}" if where else str(name))
    elif isinstance(said, list):
        for value in said:
            yield from fields_with_credentials(value, where)
    elif isinstance(said, str) and holds_credentials(said):
        yield where


def _is_a_variable(name: str) -> str:
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
        raise ValueError(
            "give the name of an environment variable with the token (capitals, digits, _), not the token"
        )
    return name


VariableName = Annotated[str, AfterValidator(_is_a_variable)]
"""Name of an environment variable with a secret. What is no name may be the secret, and is not repeated."""
