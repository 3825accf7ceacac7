"""Runs Autobahn's cases 1-7, 9 and 10 against the echo server: ``python -m tests.conformance``.

Needs the ``conformance`` extra. Exits 1 when a case fails or when fewer than all of them ran.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

CASES = 301
ACCEPTED = {"OK", "NON-STRICT", "INFORMATIONAL"}


def main() -> int:
    """Run the suite; print a count by outcome and a line for each failed case."""
    kosoku = shutil.which("kosoku", path=str(Path(sys.executable).parent)) or shutil.which("kosoku")
    if kosoku is None:
        print("kosoku is not installed: pip install -e '.[conformance]'", file=sys.stderr)
        return 1
    server = subprocess.Popen([sys.executable, "-m", "tests.echo", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(
                [kosoku, f"127.0.0.1:{port}", "-p", "1", "-x", "12.*", "-x", "13.*", "-o", directory],
                check=False,
                capture_output=True,
                timeout=600,
            )
            (cases,) = json.loads((Path(directory) / "index.json").read_text()).values()
    finally:
        server.kill()
        server.wait()
    failed = {
        name: case
        for name, case in cases.items()
        if case["behavior"] not in ACCEPTED or case["behaviorClose"] not in ACCEPTED
    }
    for name, case in failed.items():
        print(f"case {name}: {case['behavior']}, close: {case['behaviorClose']}")
    print(f"{dict(Counter(case['behavior'] for case in cases.values()))}")
    print(f"conformance: {len(cases) - len(failed)} passed, {len(failed)} failed")
    return 0 if not failed and len(cases) == CASES else 1


if __name__ == "__main__":
    sys.exit(main())
