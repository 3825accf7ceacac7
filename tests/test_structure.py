"""The plan of the house: which room may look into which, and that no room looks round a corner into itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gateway"
EVERYWHERE = {"errors", "streams", "threads", "running", "v1"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "telemetry": {"core"},
    "config": {"core"},
    "ws": {"core", "telemetry"},
    "kafka": {"core", "telemetry", "config"},
    "registry": {"core", "telemetry"},
    "router": {"core", "telemetry", "ws", "kafka", "registry"},
    "ops": {"core", "telemetry", "ws", "kafka", "registry", "router"},
    "daemon": {"core", "telemetry", "config", "ws", "kafka", "registry", "router", "ops"},
    "client": {"core"},
}
"""Rooms that are not named here may see all others."""
IMPURE = {
    "trio",
    "time",
    "logging",
    "socket",
    "os",
    "select",
    "ssl",
    "threading",
    "structlog",
    "random",
    "confluent_kafka",
    "datetime",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours by its dotted name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.stem.endswith("_pb2"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


@cache
def tree(path: Path) -> ast.Module:
    """A module's syntax."""
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    """What a module imports, anywhere in it, behind TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def room(module: str) -> str:
    """The room of a dotted name of ours."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_a_room_looks_only_into_those_it_may(name: str) -> None:
    allowed = {name, "", *EVERYWHERE, *MAY_IMPORT[name]}
    seen = [(module, path) for module, path in modules() if room(module) == name]
    assert seen
    found = {
        f"{module}: {imported}"
        for module, path in seen
        for imported in imports(path)
        if imported.startswith("gateway.") and room(imported) not in allowed
    }
    assert not found


def test_only_the_kafka_side_and_what_tests_need_know_librdkafka() -> None:
    found = {
        room(module)
        for module, path in modules()
        if any(name.partition(".")[0] == "confluent_kafka" for name in imports(path))
    }
    assert found <= {"kafka", "router", "testing", "demo"}


def test_core_does_no_io_and_knows_no_clock() -> None:
    found = {
        f"{path.name}: {name}"
        for path in (PACKAGE / "core").glob("*.py")
        for name in imports(path)
        if name.partition(".")[0] in IMPURE
    }
    assert not found


def test_no_circle_of_imports_not_even_behind_type_checking() -> None:
    known = {name for name, _ in modules()}
    graph = {name: {found for found in imports(path) if found in known and found != name} for name, path in modules()}
    for name in known:
        # `from gateway.core import books` names the package and the module: the module is what is meant
        graph[name] -= {one for one in graph[name] if any(other.startswith(f"{one}.") for other in graph[name])}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


LONG_FUNCTION: int = 40
LONG_MODULE: int = 300
REASON = "# long:"
"""What stands behind a function's first line, or in a module, with the reason why it is longer."""


def test_long_functions_and_modules_say_why() -> None:
    found = []
    for name, path in modules():
        lines = path.read_text().splitlines()
        if len(lines) > LONG_MODULE and not any(line.startswith(REASON) for line in lines):
            found.append(f"{name}: {len(lines)} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > LONG_FUNCTION:
                head = lines[node.lineno - 1 : node.body[0].lineno]
                if not any(REASON in line for line in head):
                    found.append(f"{name}.{node.name}: {_length(node)} lines")
    assert not found, "\n".join(found)


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's code, without its signature and its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


HOT = "# hot:"
THEIR_OWN = {
    "client/sender.py": {"message", "self._unacked"},
    "config/tls.py": {"context"},
    "daemon/lifecycle.py": {"self.state"},
    "daemon/workers.py": {"self._starting"},
    "ops/serve.py": {"config", "hypercorn"},
}
"""Objects of protobuf, ssl, trio-util and hypercorn, which are set up by setting attributes."""


def test_nobody_outside_a_class_sets_its_attributes() -> None:
    """But for the hot paths, which say so in their function."""
    found = []
    for name, path in modules():
        text = path.read_text()
        lines = text.splitlines()
        theirs = THEIR_OWN.get(str(path.relative_to(PACKAGE)), set())
        for function in ast.walk(tree(path)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name == "__new__":
                continue
            if any(HOT in line for line in lines[function.lineno - 1 : function.end_lineno]):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                    owner = node.value.id if isinstance(node.value, ast.Name) else ast.unparse(node.value)
                    if owner not in {"self", "cls", *theirs}:
                        found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(sorted(set(found)))
