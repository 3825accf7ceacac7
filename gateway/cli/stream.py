"""``gateway stream``: a tick file, replayed to a gateway."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from gateway.errors import ConfigError


def stream(
    ticks: Path,
    /,
    *,
    url: str,
    token: str | None = None,
    token_file: Path | None = None,
    ca: Path | None = None,
    account: str | None = None,
    rate: Annotated[float | None, Parameter(validator=cyclopts.validators.Number(gte=0))] = None,
    speed: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 1.0,
    batch: Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1, lte=500))] = 100,
) -> int:
    """Replay a tick file to a gateway, as an MT5 client would.

    Parameters
    ----------
    ticks
        A CSV file (plain or gzip) with the columns time_msc,symbol,bid,ask,volume.
    url
        The gateway, e.g. wss://host:8001/ws/mt5.
    token
        The JWT. --token-file and GATEWAY_TOKEN keep it out of the process list.
    token_file
        A file that holds the JWT.
    ca
        PEM file of a private CA.
    account
        The MT5 account.
    rate
        Ticks a second, 0 for as fast as possible. Without it the file's own pace.
    speed
        How many times the file's own pace.
    batch
        Ticks in one message at most.
    """
    from gateway.client import tls_context
    from gateway.client.stream import Pace, Summary
    from gateway.client.stream import stream as replay
    from gateway.running import run

    secret = _token_text(token, token_file)
    pace = Pace(rate=rate, speed=speed, batch=batch)

    async def replay_it() -> int:
        done: Summary = await replay(
            ticks,
            url,
            secret,
            pace=pace,
            account=account,
            tls=tls_context(url, ca),
            say=lambda line: print(f"gateway: {line}", file=sys.stderr),
        )
        print(
            f"{done.ticks:,} ticks in {done.messages:,} messages, {done.seconds:.1f} s,"
            f" {done.rejected:,} rejected, {done.reconnects} reconnects, {done.resent:,} sent again"
        )
        return 1 if done.rejected else 0

    return run(replay_it)


def _token_text(token: str | None, token_file: Path | None) -> str:
    """The token from where it was given. Raises ConfigError; never quotes it."""
    if token_file is not None:
        try:
            return token_file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                [f"--token-file {token_file}: {getattr(error, 'strerror', None) or 'not text'}"]
            ) from error
    text = token or os.environ.get("GATEWAY_TOKEN")
    if not text:
        raise ConfigError(["a token is needed: --token, --token-file or GATEWAY_TOKEN in the environment"])
    return text
