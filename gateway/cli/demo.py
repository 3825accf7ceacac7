"""``gateway demo``: the whole system on one machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter


def demo(
    *,
    ticks: Path | None = None,
    clients: Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1, lte=1000))] = 100,
    rate: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 50.0,
    seconds: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 10.0,
) -> int:
    """Show the whole system on this machine: an embedded Kafka, the daemon, clients over WSS, a checking consumer.

    Parameters
    ----------
    ticks
        Replay the prices of this CSV file instead of a random walk.
    clients
        Connected clients.
    rate
        Ticks a second of each client.
    seconds
        How long they send.
    """
    from gateway.demo.run import run_demo
    from gateway.running import run

    return run(partial(run_demo, ticks=ticks, clients=clients, rate=rate, seconds=seconds))
