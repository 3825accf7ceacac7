"""Records on disk that Kafka has not taken: append-only segments, each record with its checksum.

A directory holds segments ``0000000001.spool``, ``0000000002.spool``, ... and a ``lock``. A segment is `MAGIC` and then
records (`gateway.router.spool.records`). Nothing is ever overwritten. What `Spool.append` has returned for is on the
disk (fsync of the file, and of the directory for a new file).

A segment is read to its first fault: a length that cannot be, a checksum that does not match, a cut-off end. A segment
with a fault is kept aside as ``NAME.damaged`` when what could be read of it has been sent, and never deleted here. (A
write that was torn by a crash was never reported as done.)

All of it is blocking file work; `gateway.router.spool.writer` and `replay` call it in threads.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgpack

from gateway.errors import SpoolError
from gateway.router.spool.records import HEADER, Record, decode, encode, read_body

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAGIC: Final = b"GWSPOOL1"
SEGMENT_BYTES: Final = 64 * 1024 * 1024
"""A segment that has grown to this is followed by another: what is sent is given back to the disk piece by piece."""
LOCK_TRIES: Final = 40
LOCK_PAUSE_S: Final = 0.05
CLOSE_TIMEOUT_S: Final = 1.0
"""How long `Spool.close` waits for a write that was abandoned."""
DAMAGED: Final = ".damaged"
_NAME: Final = re.compile(r"(\d{10})\.spool\Z")


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of the spool."""

    path: Path

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    def read(self) -> Iterator[Record]:
        """The records up to the first fault. Raises OSError."""
        for record, _ in self._scan():
            yield record

    def fault_at(self) -> int | None:
        """The byte at which the first fault begins, None for a sound segment. Raises OSError."""
        with self.path.open("rb") as file:
            end = len(MAGIC) if file.read(len(MAGIC)) == MAGIC else 0
        for _, record_end in self._scan():
            end = record_end
        return end if end < self.size_bytes else None

    def _scan(self) -> Iterator[tuple[Record, int]]:
        with self.path.open("rb") as file:
            end = len(MAGIC)
            if file.read(len(MAGIC)) != MAGIC:
                return
            while (body := read_body(file)) is not None:
                try:
                    record = decode(body)
                except (ValueError, TypeError, msgpack.UnpackException):  # sound, and no record of ours
                    return
                end += HEADER.size + len(body)
                yield record, end

    def finish(self, *, damaged: bool) -> None:
        """Every record is sent: delete the file, durably, or keep it aside as ``NAME.damaged``. Raises OSError."""
        if damaged:
            os.link(self.path, self.path.with_suffix(DAMAGED))  # link(2) replaces nothing, rename(2) would
        self.path.unlink()
        _sync_directory(self.path.parent)


def list_segments(directory: Path) -> list[Segment]:
    """The segments of a spool in the order they were written. Reads names only; needs no lock. Raises SpoolError."""
    try:
        names = sorted(path for path in directory.iterdir() if _NAME.match(path.name))
    except OSError as error:
        raise SpoolError(f"spool {directory}: {error.strerror}") from error
    return [Segment(path) for path in names]


def in_use(directory: Path) -> bool:
    """True while a process holds the spool; its last segment may then end in the middle of a write."""
    try:
        lock = os.open(directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _lock(file: int) -> None:
    """Take the lock. Raises OSError while another process holds it; an inspection (`in_use`) does for microseconds."""
    for again in range(LOCK_TRIES, -1, -1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not again:
                raise
            time.sleep(LOCK_PAUSE_S)
        else:
            return


class Spool:
    """The directory, held by one process from the constructor to `close`.

    ``old`` are the segments that were there before; `append` only ever writes to new ones.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Raises SpoolError when the directory cannot be used or another process holds it."""
        self.directory = directory
        self._max_bytes = max_bytes
        self._file: int | None = None
        self._end = 0
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o700, parents=True)
                _sync_directory(directory.parent)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SpoolError(f"spool.directory: {directory}: {error.strerror}") from error
        try:
            _lock(self._lock)
        except OSError as error:
            os.close(self._lock)
            raise SpoolError(f"spool.directory: {directory} is in use by another process") from error
        self._busy = threading.Lock()
        self.old = list_segments(directory)
        # Files that were set aside count too: their names must not come again.
        self._number = max((int(path.stem) for path in directory.iterdir() if path.stem.isdecimal()), default=0)

    def close(self) -> None:
        """Give the directory back; while a write hangs, the end of the process does."""
        if self._busy.acquire(timeout=CLOSE_TIMEOUT_S):
            self._close_file()
            os.close(self._lock)
            self._busy.release()

    def size_bytes(self) -> int:
        """Bytes of all segments and what was set aside."""
        sizes = 0
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):  # deleted meanwhile: replayed
                sizes += path.stat().st_size
        return sizes

    def append(self, records: Iterable[Record]) -> None:
        """Write records behind all others and wait until the disk has them; all or none.

        Raises SpoolError when ``max_bytes`` does not allow them or the disk does not take them; what was written of
        them is cut off again.
        """
        encoded = [encode(record) for record in records]
        with self._busy:
            self._append(encoded)

    def _append(self, encoded: list[bytes]) -> None:
        wanted = sum(map(len, encoded))
        try:
            held = self.size_bytes()
            if held + wanted > self._max_bytes:
                raise SpoolError(f"spool {self.directory}: {held} bytes are held, {wanted} more exceed spool.max_bytes")
            self._write(self._open_file(), b"".join(encoded))
        except OSError as error:
            raise SpoolError(f"spool {self.directory}: {error.strerror}") from error

    def _write(self, file: int, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(file, view) :]
            os.fsync(file)
        except OSError:
            # What this file holds after a failed fsync is uncertain: it is cut back, and what follows goes to another.
            with suppress(OSError):
                os.ftruncate(file, self._end)
            self._close_file()
            raise
        self._end += len(data)

    def _path(self) -> Path:
        return self.directory / f"{self._number:010}.spool"

    def _open_file(self) -> int:
        """The segment to write to."""
        if self._file is not None and self._end < SEGMENT_BYTES:
            return self._file
        self._close_file()
        self._number += 1
        self._file = os.open(self._path(), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._end = 0
        self._write(self._file, MAGIC)
        try:
            _sync_directory(self.directory)
        except OSError:
            self._close_file()
            raise
        return self._file

    def _close_file(self) -> None:
        """Close the segment; one that holds no record is removed."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            if self._end <= len(MAGIC):
                with suppress(OSError):
                    self._path().unlink()


def _sync_directory(directory: Path) -> None:
    """Make the names in a directory durable (fsync(2): the file alone does not)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
