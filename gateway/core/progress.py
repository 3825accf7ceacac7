"""Whether Kafka confirms what it is given: alarms read out of the books, by message type.

A record that is not confirmed is tried for ever, so nothing fails while a topic lacks replicas or a leader; that
nothing moves is the only sign. A topic that refuses every record is no less useless, and shows in the same figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.core.books import UNKNOWN_TYPE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.core.tally import Tally

STALLED_S: Final = 5.0
"""Messages in flight and none confirmed for this long: Kafka's own delays are a hundredth of it."""
REFUSED_MESSAGES: Final = 10
"""So many refused in a row, and none taken, are not the messages' fault."""
FORGET_S: Final = 30.0
"""An alarm about refusals ends so long after the last one: nobody may be sending any more."""


@dataclass(slots=True)
class _Type:
    settled: int = 0
    delivered: int = 0
    refused: int = 0
    """`Tally` counts when something was last delivered, or the alarm was forgotten."""
    refusals: int = 0
    """The count of refusals at the last look, and when it had changed."""
    refused_at: float = 0.0
    moved_at: float = 0.0
    """When something was last settled, or nothing was in flight."""

    def note_settled(self, settled: int, now: float) -> None:
        """Something was settled, or nothing is waited for."""
        self.settled, self.moved_at = settled, now

    def note_refused(self, refusals: int, now: float) -> None:
        """So many have been refused so far."""
        if refusals != self.refusals:
            self.refusals, self.refused_at = refusals, now

    def note_taken(self, delivered: int, refused: int) -> None:
        """Kafka takes something, or nobody knows better any more: refusals are counted from here."""
        self.delivered, self.refused = delivered, refused


class Progress:
    """What `look` saw so far. ``reasons`` are why the gateway is not ready."""

    def __init__(self) -> None:
        self._types: dict[str, _Type] = {}
        self.reasons: tuple[str, ...] = ()
        self.stands_still = False
        """Something is in flight and nothing at all is confirmed."""

    def look(self, by_type: Mapping[str, Tally], parked: Mapping[str, int], now: float) -> list[str]:
        """Take the sums of this moment, ``now`` in seconds of any steady clock; return the alarms that are new.

        ``parked``: how many messages in flight of each type wait for a partition that is known to take nothing.
        """
        stalled, refusing, moving = [], [], False
        for message_type, tally in by_type.items():
            seen = self._types.setdefault(message_type, _Type(moved_at=now))
            settled = tally.received - tally.in_flight
            if message_type == UNKNOWN_TYPE:
                settled -= tally.dropped  # over a limit, which says nothing of Kafka
            if tally.in_flight <= parked.get(message_type, 0) or settled != seen.settled:
                moving = moving or settled != seen.settled
                seen.note_settled(settled, now)
            elif now - seen.moved_at >= STALLED_S:
                stalled.append(message_type)
            else:
                moving = True  # for all that is known yet
            refused = tally.dead_lettered + tally.spooled + tally.dropped
            seen.note_refused(refused, now)
            if tally.delivered != seen.delivered or now - seen.refused_at >= FORGET_S:
                seen.note_taken(tally.delivered, refused)
            elif message_type != UNKNOWN_TYPE and refused - seen.refused >= REFUSED_MESSAGES:
                refusing.append(message_type)
        self.stands_still = bool(stalled) and not moving
        before = self.reasons
        self.reasons = (
            *(f"kafka_stalled: no {message_type} confirmed for {STALLED_S:g} s" for message_type in stalled),
            *(f"all_records_refused: {message_type}" for message_type in refusing),
        )
        return [reason for reason in self.reasons if reason not in before]
