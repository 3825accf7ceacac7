"""``gateway stream``: replays a tick file through the gateway as BatchTickData, as an MT5 client would."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from gateway import client
from gateway.errors import ClientError, ConnectionLost, HandshakeRejected
from gateway.ticks import batches, read
from gateway.v1.ticks_pb2 import BatchTickData

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gateway.v1.ticks_pb2 import Tick

FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 30.0
_FINAL_STATUSES: Final = frozenset({400, 401, 403, 404, 405, 414, 426, 431, 505})


@dataclass(slots=True)
class Summary:
    """What a stream has done so far."""

    ticks: int = 0
    messages: int = 0
    rejected: int = 0
    reconnects: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """When ticks are due.

    ``rate`` ticks a second; 0 is as fast as the gateway takes them; None follows the file's own times, ``speed`` times
    as fast. ``batch`` bounds the ticks of one message.
    """

    rate: float | None = None
    speed: float = 1.0
    batch: int = 100

    def schedule(self, ticks: Iterator[Tick], account: str) -> Iterator[tuple[float, BatchTickData]]:
        """Batches, each with its due time in seconds from the beginning.

        At a rate, a message is sent at most every 10 ms, so that a high rate makes batches, not more messages. At the
        file's own pace, ticks of one millisecond share a message.
        """
        if self.rate is not None:
            size = self.batch if not self.rate else max(1, min(self.batch, int(self.rate / 100)))
            for number, batch in enumerate(batches(ticks, size, account)):
                yield (number * size / self.rate if self.rate else 0.0), batch
            return
        first: int | None = None
        gathered: list[Tick] = []
        for tick in ticks:
            first = tick.time_msc if first is None else first
            if gathered and (tick.time_msc != gathered[0].time_msc or len(gathered) >= self.batch):
                yield self._due(gathered[0], first), BatchTickData(ticks=gathered, account=account)
                gathered = []
            gathered.append(tick)
        if gathered and first is not None:
            yield self._due(gathered[0], first), BatchTickData(ticks=gathered, account=account)

    def _due(self, tick: Tick, first: int) -> float:
        return (tick.time_msc - first) / 1000 / self.speed


class Backoff:
    """Delays between attempts, doubling from `FIRST_DELAY_S` to `MAX_DELAY_S`, each between half of it and all."""

    def __init__(self) -> None:
        self._delay_s = FIRST_DELAY_S

    def reset(self) -> None:
        """An attempt succeeded."""
        self._delay_s = FIRST_DELAY_S

    def next_s(self, at_least_s: float = 0.0) -> float:
        """The next delay; ``at_least_s`` is what the server asked for."""
        delay_s, self._delay_s = self._delay_s, min(MAX_DELAY_S, self._delay_s * 2)
        return max(at_least_s, random.uniform(delay_s / 2, delay_s))  # noqa: S311  # jitter


async def stream(
    path: Path,
    url: str,
    token: str,
    *,
    pace: Pace,
    account: str | None = None,
    tls: ssl.SSLContext | None = None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Replay the file; returns when everything is sent and the gateway has routed what the last connection carried.

    Reconnects with jittered, growing delays when the connection is lost, and goes on with the message that could not be
    sent; what an earlier connection had under way when it broke may be lost. Raises BadTicks, and ClientError for a
    refusal that another attempt would meet again.
    """
    summary = Summary()
    began = time.monotonic()
    waiting = pace.schedule(read(path), account or "")
    pending: tuple[float, BatchTickData] | None = next(waiting, None)
    backoff = Backoff()
    while pending is not None:
        try:
            async with client.connect(url, token, account=account, tls=tls) as connection:
                backoff.reset()
                while pending is not None:
                    due_s, batch = pending
                    await trio.sleep(max(0.0, began + due_s - time.monotonic()))
                    await connection.send(
                        connection.envelope("tick_data", batch.SerializeToString(), time.time_ns() // 1_000_000)
                    )
                    summary.messages += 1
                    summary.ticks += len(batch.ticks)
                    pending = next(waiting, None)
            summary.rejected += connection.rejected
        except* (ClientError, OSError, trio.TooSlowError) as group:
            delay_s = _delay_or_raise(_leaf(group), backoff)
            summary.reconnects += 1
            say(f"{_leaf(group)}; again in {delay_s:.1f} s")
            await trio.sleep(delay_s)
    summary.seconds = time.monotonic() - began
    return summary


def _leaf(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)  # noqa: S101  # from the except*
    return error


def _delay_or_raise(error: Exception, backoff: Backoff) -> float:
    if isinstance(error, HandshakeRejected):
        if error.status in _FINAL_STATUSES:
            raise error
        return backoff.next_s(error.retry_after_s or 0.0)
    if isinstance(error, ConnectionLost) and error.code in (1002, 1003, 1007, 1009, 4403):
        raise error
    return backoff.next_s()
