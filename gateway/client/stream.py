"""``gateway stream``: replays a tick file through the gateway as BatchTickData, as an MT5 client would."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from gateway.client.sender import open_client
from gateway.client.ticks import batches, read
from gateway.v1.ticks_pb2 import BatchTickData

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gateway.v1.ticks_pb2 import Tick


@dataclass(frozen=True, slots=True)
class Summary:
    """What a stream has done."""

    ticks: int
    messages: int
    rejected: int
    resent: int
    reconnects: int
    seconds: float


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
    """Replay the file; returns when the gateway has acked every tick.

    Reconnects and sends again what was not acked: at least once, in order. Raises BadTicks, and ClientError for a
    refusal that another attempt would meet again.
    """
    ticks_sent = messages = 0
    began = time.monotonic()
    # Closed here and now, not when the collector finds the generator of a stream that was refused.
    with closing(read(path)) as ticks:
        async with open_client(url, token, account=account, tls=tls, say=say) as client:
            for due_s, batch in pace.schedule(ticks, account or ""):
                await trio.sleep(max(0.0, began + due_s - time.monotonic()))
                await client.send("tick_data", batch.SerializeToString())
                messages += 1
                ticks_sent += len(batch.ticks)
    return Summary(
        ticks=ticks_sent,
        messages=messages,
        rejected=client.rejected,
        resent=client.resent,
        reconnects=client.reconnects,
        seconds=time.monotonic() - began,
    )
