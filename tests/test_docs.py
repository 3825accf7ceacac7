"""What docstrings and README.md name is there."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from gateway.config.settings import SECTIONS
from gateway.testing.daemon import Daemon
from tests.test_structure import PACKAGE, modules, tree

README = (PACKAGE.parent / "README.md").read_text()
NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")
THEIRS = {"sd_notify", "time", "trio"}


def docstrings(tree: ast.AST, owners: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every docstring with the classes it stands in, those of attributes too."""
    body = getattr(tree, "body", [])
    for node in body if isinstance(body, list) else []:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield owners, node.value.value
        yield from docstrings(node, (*owners, node.name) if isinstance(node, ast.ClassDef) else owners)


def resolves(name: str, module: str, owners: tuple[str, ...], path: Path) -> bool:
    """Whether a name means something where it stands."""
    first, *rest = name.split(".")
    if first in SECTIONS and rest and rest[0] in SECTIONS[first].model_fields:
        return True
    if first == "gateway":
        return _is_module_or_more(name)
    found = importlib.import_module(module)
    for scope in owners or _classes(path):
        holder = getattr(found, scope, None)
        if holder is not None and (_has(holder, name) or name in _attributes(path, scope)):
            return True
    if _has(found, name) or first in _imported(path):
        return True
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return any(_is_module_or_more(f"{base}.{name}") for base in (package, package.rpartition(".")[0]) if base)


def _is_module_or_more(name: str) -> bool:
    """Whether ``name`` is a module, or something in one."""
    try:
        importlib.import_module(name)
    except ImportError:
        parent, _, leaf = name.rpartition(".")
        if not parent:
            return False
        holder: object
        try:
            holder = importlib.import_module(parent)
        except ImportError:
            outer, _, middle = parent.rpartition(".")
            try:
                holder = getattr(importlib.import_module(outer), middle, None) if outer else None
            except ImportError:
                return False
        return holder is not None and _has(holder, leaf)
    return True


def _has(holder: object, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(holder, part):
            annotations = getattr(holder, "__annotations__", {})
            return part in annotations
        holder = getattr(holder, part)
    return True


@cache
def _classes(path: Path) -> list[str]:
    """The classes of a module: its own docstring may name what they have."""
    return [node.name for node in tree(path).body if isinstance(node, ast.ClassDef)]


@cache
def _attributes(path: Path, scope: str) -> set[str]:
    """What a class sets on itself, and its fields."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef) and node.name == scope:
            return {
                one.attr
                for one in ast.walk(node)
                if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self"
            }
    return set()


@cache
def _imported(path: Path) -> set[str]:
    """Names that a module imports for type checkers alone, or inside functions."""
    return {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", [name for name, _ in modules() if not name.endswith("__main__")])
def test_names_in_docstrings_are_there(name: str) -> None:
    path = dict(modules())[name]
    missing = [
        quoted
        for owners, text in docstrings(tree(path))
        for quoted in NAME.findall(text)
        if not resolves(quoted, name, owners, path) and quoted not in THEIRS
    ]
    assert not missing, f"{name} names {', '.join(sorted(set(missing)))}"


def test_walks_through_the_code_name_what_is_there() -> None:
    steps = re.findall(r"`(\w+(?:/\w+)*\.py)(?:: ([\w.]+))?`", README)
    assert len(steps) > 40
    missing = []
    for file, name in steps:
        root = PACKAGE if (PACKAGE / file).is_file() else PACKAGE.parent
        if not (root / file).is_file():
            missing.append(file)
        elif name and not _is_module_or_more(f"gateway.{file.removesuffix('.py').replace('/', '.')}.{name}"):
            missing.append(f"{file}: {name}")
    assert not missing


def test_settings_in_the_readme_are_settings() -> None:
    sections = "|".join(SECTIONS)
    environment = re.findall(r"GATEWAY_([A-Z]+)__([A-Z_]+)", README)
    named = {*re.findall(rf"`({sections})\.(\w+)`", README), *((one.lower(), key.lower()) for one, key in environment)}
    assert len(named) > 10
    assert not {f"{section}.{key}" for section, key in named if key not in SECTIONS[section].model_fields}


def test_metrics_in_the_readme_are_metrics_and_all_metrics_are_in_it(daemon: Daemon) -> None:
    page = daemon.get("/metrics")[1]
    with Daemon(workers=2) as several:
        page += several.get("/metrics")[1]
    counted = set(re.findall(r"^# TYPE (gateway_\w+) ", page, re.MULTILINE))
    table = {
        name
        for line in README.splitlines()
        if line.startswith("| `gateway_")
        for name in re.findall(r"`(gateway_\w+)`", line)
    }
    assert table <= counted, f"not there: {sorted(table - counted)}"
    assert counted <= table, f"not in README.md: {sorted(counted - table)}"
