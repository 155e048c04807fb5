"""A configuration as TOML text: a run's own, and the template that `rlgaf config` prints."""

import json
from datetime import date
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def to_toml(config: BaseModel, *, template: bool = False) -> str:
    """The whole configuration as TOML. As a `template`, each field stands behind a `#` with its documentation
    above it: what a file says overrides a method's preset, and a template is to say nothing.
    """
    lines: list[str] = []
    _write_section(config, "", lines, template)
    return "\n".join(lines).strip() + "\n"


def tables_to_toml(tables: dict[str, Any], prefix: str = "") -> str:
    """Nested tables of plain values as TOML."""
    plain = [f"{name} = {toml_value(value)}" for name, value in tables.items() if not isinstance(value, dict)]
    text = "\n".join([*([f"[{prefix}]"] if prefix and plain else []), *plain, ""])
    nested = [(name, value) for name, value in tables.items() if isinstance(value, dict)]
    return text + "".join(
        tables_to_toml(value, f"{prefix}.{name}" if prefix else name) for name, value in nested
    )


def _write_section(section: BaseModel, prefix: str, lines: list[str], template: bool) -> None:
    if prefix:
        lines += ["", f"[{prefix}]"]
    if template and prefix and section.__doc__:
        lines += _comment(section.__doc__.split("\n\n")[0])
    nested = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            nested.append((name, value))
            continue
        if template:
            lines += ["", *_comment(field.description or ""), *_comment(_values(field))]
        said = f"{name} = {toml_value(value)}"
        lines.append(f"#{said}" if template else said)
    for name, value in nested:
        _write_section(value, f"{prefix}.{name}" if prefix else name, lines, template)


def _comment(text: str) -> list[str]:
    return [f"# {line.strip()}" for line in text.strip().splitlines()]


def _values(field: FieldInfo) -> str:
    """Which values a field can have: its options, where the documentation does not name them all, and bounds
    with an upper one."""
    options = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if any(f"`{option}`" not in (field.description or "") for option in options):
        return f"One of {', '.join(map(toml_value, options))}."
    limits = {type(limit): limit for limit in field.metadata}
    if not {Le, Lt} & limits.keys():
        return ""
    words = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}
    said = [f"{word} {getattr(limits[kind], name)}" for kind, (word, name) in words.items() if kind in limits]
    return f"{', '.join(said)}.".capitalize()


def toml_value(value: Any) -> str:
    """One value as TOML; `none` empties a field."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for the control character DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)
