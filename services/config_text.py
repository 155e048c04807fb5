"""A configuration as TOML text: a run's own, and the template that `rlgaf config` prints."""

import json
from typing import Any

from pydantic import BaseModel


def to_toml(config: BaseModel, *, template: bool = False) -> str:
    """The whole configuration as TOML. As a `template`, each field stands behind a `#` with its documentation
    above it: what a file says goes before a method's preset, and a template is to say nothing.
    """
    lines: list[str] = []
    _write_section(config, "", lines, template)
    return "\n".join(lines).strip() + "\n"


def _write_section(section: BaseModel, prefix: str, lines: list[str], template: bool) -> None:
    if prefix:
        lines += ["", f"[{prefix}]"]
    if template and prefix and section.__doc__:
        lines.append(f"# {section.__doc__.strip().splitlines()[0]}")
    nested = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            nested.append((name, value))
            continue
        if template:
            lines += ["", *(f"# {line}" for line in (field.description or "").splitlines())]
        said = f"{name} = {_toml_value(value)}" if value is not None else f"# {name} ="
        lines.append(f"#{said}" if template and value is not None else said)
    for name, value in nested:
        _write_section(value, f"{prefix}.{name}" if prefix else name, lines, template)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for the control character DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
