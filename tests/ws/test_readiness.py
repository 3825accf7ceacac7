"""The shared epoll: one connection's failure is its own, a pause holds everybody, what stalled goes first."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
import trio.lowlevel

from gateway.ws.readiness import Readiness


class Reader:
    """A connection that notes what it hands over, and raises, pauses or stalls when told to."""

    backlog = 0

    def __init__(self, readiness: Readiness, name: str, journal: list[str]) -> None:
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.fd = self.ours.fileno()
        self.name = name
        self.journal = journal
        self.raises: Exception | None = None
        self.stalls = 0
        self.held = ""
        self.crashed: Exception | None = None
        self.seen = trio.Event()
        self._readiness = readiness
        readiness.add(self)

    def feed(self) -> None:
        if self.raises is not None:
            raise self.raises
        data = self.ours.recv(100).decode()
        if self._readiness.paused:
            self.held += data
            self._readiness.defer(self)
        elif self.stalls:
            self.journal.append(f"{self.name} stalls")
            self._readiness.stall(self)
        else:
            self.journal.append(f"{self.name}:{data}")
        self.seen.set()

    def resume(self) -> None:
        if self.raises is not None:
            raise self.raises
        if self.held:
            self.journal.append(f"{self.name}:{self.held}")
            self.held = ""
            return
        self.stalls -= 1
        if self.stalls:
            self._readiness.stall(self)
        else:
            self.journal.append(f"{self.name} resumed")

    def flush(self) -> None:
        self.journal.append(f"{self.name} flushed")
        self._readiness.want_write(self, False)
        self.seen.set()

    def crash(self, error: Exception) -> None:
        self.crashed = error
        self._readiness.remove(self)
        self.seen.set()

    def close(self) -> None:
        self.ours.close()
        self.peer.close()


@pytest.fixture
def journal() -> list[str]:
    return []


@pytest.fixture
def pair(nursery: trio.Nursery, journal: list[str]) -> Iterator[tuple[Readiness, Reader, Reader]]:
    readiness = Readiness()
    first, second = Reader(readiness, "first", journal), Reader(readiness, "second", journal)
    nursery.start_soon(readiness.run)
    yield readiness, first, second
    first.close()
    second.close()


async def test_an_exception_reaches_its_own_connection_only(
    pair: tuple[Readiness, Reader, Reader], journal: list[str]
) -> None:
    _, first, second = pair
    first.raises = ValueError("boom")
    first.peer.send(b"x")
    await first.seen.wait()
    second.peer.send(b"y")
    await second.seen.wait()
    assert first.crashed is first.raises
    assert journal == ["second:y"]


async def test_while_paused_nothing_is_handed_over(pair: tuple[Readiness, Reader, Reader], journal: list[str]) -> None:
    readiness, first, second = pair
    readiness.pause()
    first.peer.send(b"x")
    second.peer.send(b"y")
    await first.seen.wait()
    await second.seen.wait()
    assert journal == []
    readiness.resume()
    assert sorted(journal) == ["first:x", "second:y"]


async def test_a_connection_that_holds_its_share_is_left_unread_until_it_wants_more(
    pair: tuple[Readiness, Reader, Reader], journal: list[str]
) -> None:
    readiness, first, second = pair
    readiness.want_read(first, False)
    first.peer.send(b"x")
    second.peer.send(b"y")
    await second.seen.wait()
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert (journal, readiness.leaves(first)) == (["second:y"], True)
    readiness.want_read(first, True)
    await first.seen.wait()
    assert journal == ["second:y", "first:x"]


async def test_shares_are_equal_and_bounded_by_the_sum(nursery: trio.Nursery, journal: list[str]) -> None:
    readiness = Readiness(max_held_bytes=400_000)
    readers = [Reader(readiness, str(number), journal) for number in range(4)]
    assert readiness.may_hold(99_999)
    assert not readiness.may_hold(100_000), "a quarter of the sum"
    readiness.held_bytes = 400_000
    assert not readiness.may_hold(0), "the sum is used up"
    for reader in readers:
        reader.close()


async def test_what_stalled_is_handed_over_before_anything_is_read(
    pair: tuple[Readiness, Reader, Reader], journal: list[str]
) -> None:
    readiness, first, second = pair
    first.stalls = 2
    first.peer.send(b"x")
    await first.seen.wait()
    assert readiness.paused
    second.peer.send(b"y")
    readiness.resume()
    assert readiness.paused, "it stalled again"
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert journal == ["first stalls"]
    readiness.resume()
    await second.seen.wait()
    assert journal == ["first stalls", "first resumed", "second:y"]


async def test_an_exception_while_resuming_is_the_connections_own(
    pair: tuple[Readiness, Reader, Reader],
) -> None:
    readiness, first, second = pair
    first.stalls = 1
    first.peer.send(b"x")
    await first.seen.wait()
    first.raises = ValueError("boom")
    readiness.resume()
    assert first.crashed is first.raises
    assert not readiness.paused
    second.peer.send(b"y")
    await second.seen.wait()


async def test_a_connection_that_wants_to_write_is_flushed_once(
    pair: tuple[Readiness, Reader, Reader], journal: list[str]
) -> None:
    readiness, first, _ = pair
    readiness.want_write(first, True)
    await first.seen.wait()
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert journal == ["first flushed"]


@pytest.mark.parametrize(("turn_s", "turns"), [(0.0, 2), (60.0, 1)])
async def test_a_turn_that_takes_too_long_ends_and_its_rest_is_fed_in_the_next(
    pair: tuple[Readiness, Reader, Reader],
    journal: list[str],
    monkeypatch: pytest.MonkeyPatch,
    turn_s: float,
    turns: int,
) -> None:
    readiness, first, second = pair
    monkeypatch.setattr("gateway.ws.readiness.TURN_S", turn_s)
    first.peer.send(b"x")
    second.peer.send(b"y")  # both are ready when the epoll is next asked
    await first.seen.wait()
    await second.seen.wait()
    assert sorted(journal) == ["first:x", "second:y"]
    assert readiness.turns == turns


async def test_removed_connections_are_forgotten(pair: tuple[Readiness, Reader, Reader], journal: list[str]) -> None:
    readiness, first, second = pair
    readiness.remove(first)
    readiness.remove(first)
    first.peer.send(b"x")
    second.peer.send(b"y")
    await second.seen.wait()
    assert journal == ["second:y"]
    assert len(readiness) == 1
