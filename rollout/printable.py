"""Text of models, data files and other hosts, made harmless for terminals and pages."""

import re

# C0 and C1 controls but tab and line feed; marks and overrides of the writing direction
_ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with each character that a terminal or page would act on spelled out, as in `\u001b` (which
    inside a JSON string still means that character). Tabs and line feeds stay.
    """
    return _ACTS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str, most: int = 200) -> str:
    """The same of a text's beginning, without line breaks: for messages."""
    return printable(text[:most]).replace("\n", "\\n")
