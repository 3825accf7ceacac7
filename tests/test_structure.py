"""The directions of the design: ingress and egress import core, never each other; core is pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gateway"
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
FORBIDDEN = {
    "ingress": ("gateway.egress", "gateway.sidecar", "gateway.app", "confluent_kafka"),
    "egress": ("gateway.ingress", "gateway.sidecar", "gateway.app"),
    "core": (
        "gateway.ingress",
        "gateway.egress",
        "gateway.sidecar",
        "gateway.telemetry",
        "gateway.app",
        "gateway.config",
    ),
    "sidecar": ("gateway.ingress", "gateway.egress", "gateway.core", "gateway.app"),
    "telemetry": ("gateway.ingress", "gateway.egress", "gateway.sidecar", "gateway.app"),
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_folder_imports_only_in_its_direction(folder: str) -> None:
    modules = sorted((PACKAGE / folder).glob("*.py"))
    assert modules
    found = {f"{path.name}: {name}" for path in modules for name in imports(path) if name.startswith(FORBIDDEN[folder])}
    assert not found


def test_core_does_no_io_and_knows_no_clock() -> None:
    found = {
        f"{path.name}: {name}"
        for path in (PACKAGE / "core").glob("*.py")
        for name in imports(path)
        if name.partition(".")[0] in IMPURE
    }
    assert not found


def test_only_the_composition_root_sees_both_sides() -> None:
    both = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("gateway.ingress") for name in imports(path))
        and any(name.startswith("gateway.egress") for name in imports(path))
    }
    assert both == {"app.py"}
