"""What a command needs to import."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["check-config", "--help"], ["spool", "--help"], ["token", "--help"]]
)
def test_help_needs_neither_trio_nor_librdkafka(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from gateway.cli import app\n"
        f"app({arguments!r}, result_action='return_value')\n"
        "print(sorted({'trio', 'confluent_kafka', 'pydantic', 'hypercorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "Usage: gateway" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
