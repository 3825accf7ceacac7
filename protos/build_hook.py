"""Hatchling build hook: generates ``gateway/v1/*_pb2.py`` and ``.pyi`` from ``protos/``.

Runs for wheels, sdists and editable installs alike, so that no generated file is committed.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtobufBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's generic has no public parameter
    """Compiles every schema below ``protos/`` into the package of the same path."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run protoc; raises RuntimeError with its exit status when a schema does not compile."""
        from grpc_tools import protoc

        root = Path(self.root)
        sources = sorted(str(path) for path in (root / "protos").rglob("*.proto"))
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={root / 'protos'}",
                f"--proto_path={files('grpc_tools') / '_proto'}",
                f"--python_out={root}",
                f"--pyi_out={root}",
                *sources,
            ]
        )
        if status != 0:
            raise RuntimeError(f"protoc failed with status {status} on {sources}")
        build_data["artifacts"].extend(["gateway/v1/*_pb2.py", "gateway/v1/*_pb2.pyi"])
