"""Imports point one way: rollout <- learner <- discriminator <- services."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "rollout": set(),
    "learner": {"rollout"},
    "discriminator": {"rollout", "learner"},
    "services": {"rollout", "learner", "discriminator"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything a module imports, inside functions and type-checking blocks too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would slip past this test"
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            assert node.args, "an import without a name"
            assert isinstance(node.args[0], ast.Constant), f"line {node.lineno}: an import by a computed name"
            names.add(str(node.args[0].value).split(".")[0])
    return names


LOADS_THE_USERS_CODE = {"discriminator/user_function.py"}


def test_only_the_users_own_functions_are_loaded_by_a_computed_name():
    found = {
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in modules(package)
        if "resolve_name" in path.read_text()
    }
    assert found == LOADS_THE_USERS_CODE


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    assert modules(package)
    for path in modules(package):
        wrong = imported(ast.parse(path.read_text())) & (MAY_IMPORT.keys() - MAY_IMPORT[package] - {package})
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", ["rollout", "learner"])
def test_neither_rollout_nor_learner_can_name_the_discriminator_or_a_demonstration(package):
    """No name, attribute or string in the code (docstrings aside) that could look one up."""
    if package == "rollout":
        words: tuple[str, ...] = ("discriminator",)  # its reader delivers the demonstrations
    else:
        words = ("discriminator", "demonstration")
    for path in modules(package):
        tree = ast.parse(path.read_text())
        docstrings = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        }
        for node in ast.walk(tree):
            named = ""
            if isinstance(node, ast.Name):
                named = node.id
            elif isinstance(node, ast.Attribute):
                named = node.attr
            elif isinstance(node, ast.arg):
                named = node.arg
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                named = node.value
            assert not any(word in named.lower() for word in words), (
                f"{path.relative_to(ROOT)}:{node.lineno}: {named}"
            )


def test_no_file_of_a_package_reads_the_tests():
    for package in MAY_IMPORT:
        for path in modules(package):
            assert not imported(ast.parse(path.read_text())) & {"tests", "conftest", "benchmarks"}, path
