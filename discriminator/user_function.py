"""Functions of the user's own, named in the configuration as `path/to/file.py:function` or
`package.module:function`: a reward, measures of an evaluation.
"""

import inspect
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

SPELLING = '"path/to/file.py:function" or "package.module:function"'


class UserFunctionError(ValueError):
    """A reference leads to no such function; the message gives the reference and the reason."""


def names_a_function(reference: str) -> bool:
    """Whether a reference is spelled like one."""
    source, colon, function = reference.rpartition(":")
    dotted = source.endswith(".py") or all(part.isidentifier() for part in source.split("."))
    return bool(colon) and dotted and function.isidentifier()


def load_user_function(field: str, reference: str, arguments: int, described: str) -> Callable[..., Any]:
    """The function that a configuration's field names.

    A file is imported as Python imports it when it is run from the folder above its outermost package (a
    folder with `__init__.py`), or from its own folder without one: that folder comes first on `sys.path`.

    Args:
        field: the configuration's, for messages.
        reference: what it says.
        arguments: how many positional arguments the function is called with.
        described: what it takes and returns, for messages.

    Raises:
        UserFunctionError: no such file, module or function, an import that fails, or no function of that many
            arguments.
    """
    source, _, function = reference.rpartition(":")
    where = f"{field} = {reference!r}"
    module, file = (source, None) if not source.endswith(".py") else _importable(where, Path(source))
    try:
        imported = pkgutil.resolve_name(f"{module}:")
    except Exception as error:  # the user's file may fail in any way; the reason belongs to the message
        raise UserFunctionError(
            f"{where}: importing {source} failed with {type(error).__name__}: {error}{_hint(error, module)}"
        ) from error
    loaded = getattr(imported, "__file__", None)
    if file is not None and (loaded is None or Path(loaded).resolve() != file):
        raise UserFunctionError(
            f"{where}: another module named {module} is loaded already ({loaded}); rename the file"
        )
    if not hasattr(imported, function):
        known = ", ".join(_functions(imported))
        raise UserFunctionError(
            f"{where}: {source} has no {function!r}" + (f"; it has {known}" if known else "")
        )
    found = getattr(imported, function)
    if not callable(found) or not _takes(found, arguments):
        raise UserFunctionError(f"{where}: must be a function of {described}")
    return found


def _hint(error: Exception, module: str) -> str:
    """Where a module that was not found could be."""
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return "; install it, put its folder on PYTHONPATH, or name the file: path/to/file.py:function"
    return ""


def _importable(where: str, path: Path) -> tuple[str, Path]:
    """Dotted name and resolved path of a Python file, with the folder it is imported from on `sys.path`."""
    file = path.expanduser().resolve()
    if not file.is_file():
        raise UserFunctionError(f"{where}: no such file (looked for {file})")
    names, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    if not all(name.isidentifier() for name in names):
        raise UserFunctionError(f"{where}: {'.'.join(names)} cannot be imported; rename it")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return ".".join(names), file


def _functions(module: ModuleType) -> list[str]:
    """Public functions that a module defines itself."""
    return [
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _takes(function: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except (TypeError, ValueError):
        return False
    return True
