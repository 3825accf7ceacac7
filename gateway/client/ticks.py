"""Ticks for the client side: read from a CSV file, or made up as a random walk."""

from __future__ import annotations

import csv
import gzip
import io
import random
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.errors import BadTicks
from gateway.v1.ticks_pb2 import BatchTickData, Tick

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

COLUMNS: Final = ("time_msc", "symbol", "bid", "ask", "volume")
QUOTE_FLAGS: Final = 2 | 4  # MqlTick: TICK_FLAG_BID | TICK_FLAG_ASK

_SYMBOLS: Final = (
    ("EURUSD", 1.08, 5, 0.00002),
    ("XAUUSD", 2400.0, 2, 0.15),
    ("GBPUSD", 1.27, 5, 0.00003),
    ("USDJPY", 150.0, 3, 0.004),
    ("BTCUSD", 60_000.0, 1, 8.0),
)


def read(path: Path) -> Generator[Tick]:
    """Ticks of a CSV file, plain or gzip, with a header line of `COLUMNS`, in the file's order.

    Nothing is judged: equal times, repeated rows and ask below bid are what real feeds hold. Raises BadTicks.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                yield from _parse(path, text)
    except OSError as error:
        raise BadTicks(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, EOFError, csv.Error, zlib.error) as error:
        raise BadTicks(f"{path}: not a CSV file of ticks: {error}") from error


def _parse(path: Path, text: io.TextIOWrapper) -> Iterator[Tick]:
    rows = csv.reader(text)
    header = next(rows, [])
    if tuple(header) != COLUMNS:
        raise BadTicks(f"{path}, line 1: wanted the columns {','.join(COLUMNS)}, found {','.join(header)[:80]!r}")
    for row in rows:
        if len(row) != len(COLUMNS):
            raise BadTicks(f"{path}, line {rows.line_num}: {len(row)} columns instead of {len(COLUMNS)}")
        column = ""
        try:
            column = "time_msc"
            time_msc = int(row[0])
            column = "bid"
            bid = float(row[2])
            column = "ask"
            ask = float(row[3])
            column = "volume"
            volume = float(row[4])
            yield Tick(
                symbol=row[1],
                time_msc=time_msc,
                bid=bid,
                ask=ask,
                volume=int(volume),
                volume_real=volume,
                flags=QUOTE_FLAGS,
            )
        except (ValueError, OverflowError) as error:
            raise BadTicks(f"{path}, line {rows.line_num}: {column}: {error}") from error


def walk(seed: int) -> Iterator[Tick]:
    """An endless random walk of one symbol, stamped with the present moment."""
    chance = random.Random(seed)  # noqa: S311  # prices, not secrets
    symbol, price, digits, step = _SYMBOLS[seed % len(_SYMBOLS)]
    while True:
        price = max(step, price + chance.gauss(0.0, step))
        spread = step * (1.0 + chance.expovariate(2.0))
        yield Tick(
            symbol=symbol,
            time_msc=time.time_ns() // 1_000_000,
            bid=round(price, digits),
            ask=round(price + spread, digits),
            flags=QUOTE_FLAGS,
        )


def batches(ticks: Iterator[Tick], size: int, account: str) -> Iterator[BatchTickData]:
    """Cut ``ticks`` into batches of ``size``, the last one smaller."""
    while batch := list(islice(ticks, size)):
        yield BatchTickData(ticks=batch, account=account)
