"""Looks into ticks, where the operator wants that: the one place that reads payloads (`gateway.core.pairs`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from gateway.core.envelope import parse
from gateway.errors import NotAnEnvelope
from gateway.v1.ticks_pb2 import BatchTickData

if TYPE_CHECKING:
    from gateway.telemetry.metrics import Metrics

TICKS: Final = "tick_data"
"""The message type whose payload is a `BatchTickData`."""


class Inspection:
    """Whether messages are looked into; what was found is counted."""

    def __init__(self, metrics: Metrics, *, wanted: bool = False) -> None:
        self.wanted = wanted
        self.over = metrics.counter("gateway_pairs_over_limit", "Looks that found a user over its tier's pairs.")

    def want(self, wanted: bool) -> None:
        """Look into the messages of connections that open from now on, or of nobody any more."""
        self.wanted = wanted


def symbols_of(raw: bytes) -> set[str]:
    """The symbols of a message of ticks; none of anything else."""
    try:
        envelope = parse(raw)
        if envelope.message_type != TICKS:
            return set()
        return {tick.symbol for tick in BatchTickData.FromString(envelope.payload).ticks if tick.symbol}
    except (NotAnEnvelope, DecodeError):
        return set()
