"""The fate of a message, as a table: the states it can be in, what can happen to it, and what it is then.

::

    NEW ──► QUEUED ──────────────► DELIVERED
     │       │  ▲
     │       ▼  │
     │      RETURNED
     │       │
     ├───────┴──► DEAD_LETTER_DUE ◄──► DEAD_LETTER_QUEUED ──► DEAD_LETTERED
     │                │   ▲                 │
     └──────────────► SPOOLING ◄────────────┘ ─────────────► SPOOLED, or DROPPED where there is no spool

Everything that decides where a message goes next is here; `gateway.router.delivery` does what entering a state means.
The states from QUEUED to SPOOLING are the ones that count as in flight. A message without more to it than its bytes,
which most are, has no object and no state: it waits in its lane, QUEUED, until Kafka has it (`gateway.router.lanes`).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from gateway.errors import GatewayError

if TYPE_CHECKING:
    from gateway.core.tally import Place


class State(Enum):
    """Where a message is."""

    NEW = "just received, or just out of the spool: not taken yet, so not in the books"
    QUEUED = "with the producer, for its own topic"
    RETURNED = "handed back by the producer: waits to be queued"
    DEAD_LETTER_DUE = "Kafka will not take it: waits to be queued as a dead letter"
    DEAD_LETTER_QUEUED = "with the producer, for the dead-letter topic"
    SPOOLING = "waits for the disk"
    DELIVERED = "in its topic"
    DEAD_LETTERED = "in the dead-letter topic"
    SPOOLED = "on the disk"
    DROPPED = "nowhere: there is no spool"


class Event(Enum):
    """What can happen to a message."""

    TAKEN = "the producer has taken it"
    CONFIRMED = "Kafka has it"
    REFUSED = "Kafka will never take it, or it was judged so"
    HANDED_BACK = "it failed for no fault of its own"
    ABANDONED = "Kafka is not waited for any longer"
    WRITTEN = "the disk has it"
    NO_SPOOL = "there is nowhere to put it"
    OFFERED_AGAIN = "the disk takes nothing: Kafka is asked once more"


FATES: Final = {
    (State.NEW, Event.TAKEN): State.QUEUED,
    (State.NEW, Event.REFUSED): State.DEAD_LETTER_DUE,
    (State.NEW, Event.HANDED_BACK): State.RETURNED,
    (State.NEW, Event.ABANDONED): State.SPOOLING,
    (State.QUEUED, Event.CONFIRMED): State.DELIVERED,
    (State.QUEUED, Event.REFUSED): State.DEAD_LETTER_DUE,
    (State.QUEUED, Event.HANDED_BACK): State.RETURNED,
    (State.QUEUED, Event.ABANDONED): State.SPOOLING,
    (State.RETURNED, Event.TAKEN): State.QUEUED,
    (State.RETURNED, Event.REFUSED): State.DEAD_LETTER_DUE,
    (State.RETURNED, Event.ABANDONED): State.SPOOLING,
    (State.DEAD_LETTER_DUE, Event.TAKEN): State.DEAD_LETTER_QUEUED,
    (State.DEAD_LETTER_DUE, Event.REFUSED): State.SPOOLING,
    (State.DEAD_LETTER_DUE, Event.ABANDONED): State.SPOOLING,
    (State.DEAD_LETTER_QUEUED, Event.CONFIRMED): State.DEAD_LETTERED,
    (State.DEAD_LETTER_QUEUED, Event.REFUSED): State.SPOOLING,
    (State.DEAD_LETTER_QUEUED, Event.HANDED_BACK): State.DEAD_LETTER_DUE,
    (State.DEAD_LETTER_QUEUED, Event.ABANDONED): State.SPOOLING,
    (State.SPOOLING, Event.WRITTEN): State.SPOOLED,
    (State.SPOOLING, Event.NO_SPOOL): State.DROPPED,
    (State.SPOOLING, Event.OFFERED_AGAIN): State.DEAD_LETTER_DUE,
}
"""What a message is after an event; what is not here cannot happen."""

WAITING: Final = frozenset({State.NEW, State.RETURNED, State.DEAD_LETTER_DUE})
"""The states in which a message waits to be queued."""

PLACES: Final[dict[State, Place]] = {
    State.DELIVERED: "delivered",
    State.DEAD_LETTERED: "dead_lettered",
    State.SPOOLED: "spooled",
    State.DROPPED: "dropped",
}
"""The last states, and where the books have a message then."""


class ImpossibleFate(GatewayError):
    """An event that cannot happen to a message in its state: a bug, named so that it is found."""


def after(state: State, event: Event) -> State:
    """What a message in ``state`` is once ``event`` has happened to it. Raises ImpossibleFate."""
    found = FATES.get((state, event))
    if found is None:
        raise ImpossibleFate(f"{event.name} cannot happen to a message that is {state.name}")
    return found
