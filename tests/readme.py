"""Runs the sh blocks of README.md in order, as a new user on a clean machine would: ``python -m tests.readme``.

The blocks run in a clone of the repository, with a home directory of their own, no virtual environment and no settings
of the gateway in the environment. Kept are what belongs to the machine: pip's settings and the cache (wheels, jars).

HTML comments before a block say what it is. ``<!-- runs: WORDS -->``: its last command runs until stopped, and is up
when its output shows the words; it is stopped at ``<!-- stops -->`` (the one that was started last) or at the end.
``<!-- tests -->``: the test suite, which ``--skip tests`` leaves out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parent.parent
BLOCK_LIMIT_S: Final = 600.0
UP_LIMIT_S: Final = 120.0
STOP_LIMIT_S: Final = 120.0
"""The longest drain, and time to spare."""
LEFTOVERS_LIMIT_S: Final = 5.0
"""How long what a block has started may outlive it."""
POLL_S: Final = 0.05
SHOWN_LINES: Final = 40
STOPPED: Final = (0, 128 + signal.SIGINT)

NOT_KEPT: Final = ("GATEWAY_", "KAFKA_", "XDG_", "PYTHON", "PYTEST_", "VIRTUAL_ENV", "CONDA_")
NOT_KEPT_NAMES: Final = {"CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "NOTIFY_SOCKET", "BASH_ENV", "ENV"}
NOT_COPIED: Final = (".git", ".venv", "__pycache__", "*_pb2.py", "*_pb2.pyi", "*.egg-info", ".*_cache", ".hypothesis")


class BadReadme(Exception):
    """The README cannot be run; the message says where it breaks the convention."""


class Failed(Exception):
    """A block did not do what it should; the message says what it did."""


@dataclass(frozen=True, slots=True)
class Block:
    """One sh block and the comments right before it."""

    line: int
    text: str
    marks: frozenset[str]
    up: str | None

    @property
    def title(self) -> str:
        """Where it is and how it begins."""
        first, _, more = self.text.strip().partition("\n")
        return f"README.md:{self.line}: {first}{' ...' if more else ''}"


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of the command that was started last."""


def parse(text: str) -> list[Block | Stop]:
    """What is to be done, in order. Raises BadReadme."""
    steps: list[Block | Stop] = []
    running = 0
    comments: list[str] = []
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        if comment := re.fullmatch(r"\s*<!--\s*(.*?)\s*-->\s*", line):
            comments.append(comment[1])
            if comment[1] == "stops":
                if not running:
                    raise BadReadme(f"README.md:{number}: nothing runs that could be stopped")
                running -= 1
                steps.append(Stop())
            continue
        if not line.strip():
            continue
        if fence := re.fullmatch(r"\s*(```+|~~~+)\s*(\S*).*", line):
            body = _body(lines, number, fence[1])
            if fence[2] in {"bash", "shell", "console", "sh-session"}:
                raise BadReadme(f"README.md:{number}: a block of commands is marked sh, not {fence[2]}")
            if fence[2] == "sh":
                block = _block(number, body, comments)
                running += block.up is not None
                steps.append(block)
            elif any(comment.startswith("runs:") for comment in comments):
                raise BadReadme(f"README.md:{number}: 'runs:' before a block that is not sh")
        elif any(comment.startswith("runs:") for comment in comments):
            raise BadReadme(f"README.md:{number}: 'runs:' is not right before its block")
        comments = []
    if not any(isinstance(step, Block) for step in steps):
        raise BadReadme("README.md has no sh block")
    return steps


def _body(lines: Iterator[tuple[int, str]], number: int, fence: str) -> str:
    body: list[str] = []
    for _, line in lines:
        if line.strip() == fence:
            return "\n".join(body) + "\n"
        body.append(line)
    raise BadReadme(f"README.md:{number}: the block has no end")


def _block(number: int, body: str, comments: list[str]) -> Block:
    words = [comment.partition(":")[2].strip() for comment in comments if comment.startswith("runs:")]
    if len(words) > 1 or not all(words):
        raise BadReadme(f"README.md:{number}: wanted one <!-- runs: WORDS -->")
    return Block(number, body, frozenset(comments), words[0] if words else None)


def new_environment(home: Path, temporary: Path) -> dict[str, str]:
    """This process's environment without what a new user has not got."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(NOT_KEPT) and name not in NOT_KEPT_NAMES
    }
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = [entry for entry in os.get_exec_path() if not (Path(entry).parent / "pyvenv.cfg").exists()]
    new = {
        "HOME": str(home),
        "TMPDIR": str(temporary),  # goes away with whatever a killed command leaves in it
        "XDG_CACHE_HOME": cache,
        "PATH": os.pathsep.join(path),
    }
    # An index or a proxy that this machine needs stands in the old home, where pip no longer looks.
    for settings in (Path.home() / ".config" / "pip" / "pip.conf", Path.home() / ".pip" / "pip.conf"):
        if settings.is_file():
            kept.setdefault("PIP_CONFIG_FILE", str(settings))
    return {**kept, **new}


def git(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run git, untouched by a hook's variables that name another repository."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    }
    return subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def check_out(target: Path) -> bool:
    """A clean copy of the repository; False when it is no clone, for this is not one or git refuses it."""
    if (ROOT / ".git").exists() and shutil.which("git") is not None:
        done = git("clone", "--quiet", str(ROOT), str(target), directory=ROOT)
        if done.returncode == 0:
            if changed := git("status", "--porcelain", directory=ROOT).stdout.splitlines():
                print(f"note: the last commit is tried; files that differ from it: {len(changed)}")
            return True
        print(f"note: no clone ({done.stderr.strip()}), the files as they are instead")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
    return False


class Command:
    """A block under way, in a process group of its own; its output goes to a file."""

    def __init__(self, block: Block, directory: Path, environment: dict[str, str], output: Path) -> None:
        self.block = block
        self.ended = False
        self._output = output
        # A signal to the group reaches the shell too: with a trap it waits for its command and takes over its status.
        script = f"trap : TERM\n{block.text}" if block.up is not None else block.text
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace")

    def finish(self) -> None:
        """Wait for its end. Raises Failed."""
        try:
            status = self._process.wait(BLOCK_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(
                f"still running after {BLOCK_LIMIT_S:.0f} s (does it run until stopped? then it needs <!-- runs -->)"
            ) from None
        if status != 0:
            raise Failed(f"exit status {status}")
        self._check_leftovers()

    def wait_up(self) -> None:
        """Wait until it shows the words. Raises Failed."""
        assert self.block.up is not None
        deadline = time.monotonic() + UP_LIMIT_S
        while self.block.up not in self.output():
            if self._process.poll() is not None and self.block.up not in self.output():
                raise Failed(f"ended before {self.block.up!r}, exit status {self._process.returncode}")
            if time.monotonic() > deadline:
                raise Failed(f"no {self.block.up!r} within {UP_LIMIT_S:.0f} s")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End it as its user would. Raises Failed."""
        if self._process.poll() is not None:
            raise Failed(f"ended by itself, exit status {self._process.returncode}")
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            status = self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"still running {STOP_LIMIT_S:.0f} s after SIGTERM") from None
        if status not in STOPPED:
            raise Failed(f"exit status {status} after SIGTERM")
        self._check_leftovers()

    def _check_leftovers(self) -> None:
        deadline = time.monotonic() + LEFTOVERS_LIMIT_S
        while _group_lives(self._process.pid):
            if time.monotonic() > deadline:
                raise Failed("left processes behind")
            time.sleep(POLL_S)

    def end(self) -> None:
        """Leave nothing of it behind, whatever it is doing."""
        if self.ended:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.ended = True


def _group_lives(group: int) -> bool:
    """Whether a process group has a member that runs (proc(5)); one that only nobody has waited for does not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = stat.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                return True
    return False


class Runner:
    """Runs the steps in a directory and counts how they end."""

    def __init__(self, directory: Path, environment: dict[str, str], outputs: Path, skip: set[str]) -> None:
        self.passed = 0
        self.failed = 0
        self._directory = directory
        self._environment = environment
        self._outputs = outputs
        self._skip = skip
        self._started: list[Command] = []
        self._running: list[Command] = []

    def run(self, steps: list[Block | Stop]) -> None:
        """All steps, and the end of what is still running."""
        try:
            for step in steps:
                if isinstance(step, Block):
                    self._start(step)
                else:
                    self._stop(self._running.pop())
            while self._running:
                self._stop(self._running.pop())
        finally:
            for command in self._started:
                command.end()

    def _start(self, block: Block) -> None:
        print(f"== {block.title}", flush=True)
        if block.marks & self._skip:
            print("   skipped", flush=True)
            return
        command = Command(block, self._directory, self._environment, self._outputs / f"{block.line}")
        self._started.append(command)
        if block.up is None:
            self._judge(command, command.finish)
            command.end()
            return
        self._running.append(command)
        if not self._judge(command, command.wait_up, passed="up"):
            command.end()

    def _stop(self, command: Command) -> None:
        if command.ended:  # it did not come up, which has been counted
            return
        print(f"== {command.block.title}: stop", flush=True)
        self._judge(command, command.stop)
        command.end()

    def _judge(self, command: Command, act: Callable[[], None], passed: str = "passed") -> bool:
        began = time.monotonic()
        try:
            act()
        except Failed as failure:
            self.failed += 1
            for line in command.output().splitlines()[-SHOWN_LINES:]:
                print(f"   | {line}")
            print(f"   FAILED after {time.monotonic() - began:.0f} s: {failure}", flush=True)
            return False
        self.passed += passed == "passed"  # one that is up is counted when it has ended
        print(f"   {passed} after {time.monotonic() - began:.0f} s", flush=True)
        return True

    def check_clean(self) -> None:
        """What the README has one write into the checkout, secrets among it, is nothing that git would commit."""
        print("== git status", flush=True)
        found = git("status", "--porcelain", directory=self._directory).stdout.splitlines()
        for line in found:
            print(f"   | {line}")
        print("   FAILED: the blocks leave files that are not ignored" if found else "   passed", flush=True)
        self.failed += bool(found)
        self.passed += not found


def main() -> int:
    """Run the README; 0 when every block did what it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--skip", action="append", choices=["tests"], default=[], help="the test suite; CI has run it")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    with tempfile.TemporaryDirectory(prefix="gateway-readme-", ignore_cleanup_errors=True) as name:
        top = Path(name)
        home, temporary, outputs = (top / part for part in ("home", "tmp", "outputs"))
        for directory in (home, temporary, outputs):
            directory.mkdir()
        is_clone = check_out(top / "gateway")
        try:
            steps = parse((top / "gateway" / "README.md").read_text())
        except BadReadme as error:
            sys.exit(str(error))
        runner = Runner(top / "gateway", new_environment(home, temporary), outputs, set(options.skip))
        runner.run(steps)
        if is_clone:
            runner.check_clean()
    print(f"{runner.passed} passed, {runner.failed} failed")
    return 1 if runner.failed else 0


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
