"""Messages that wait to be queued again, put into the order in which they came.

A broken producer hands records back in an order of its own. `Waitlist` takes them as they come: lanes of which all
records come back (`Lane.reclaim`), and single messages. `sort_some` makes one queue of them, a slice at a time, and of
what waited already; until that is done, and while something waits, nothing new may be queued.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gateway.router.lanes import Lane
    from gateway.router.messages import Message


class Waitlist:
    """``ready`` is what waits in order, oldest first; the rest is on its way there."""

    def __init__(self, returned: Callable[[Message], None]) -> None:
        """``returned`` is told of every message that is taken out of its lane."""
        self._note_returned = returned
        self._lanes: dict[Lane, None] = {}
        self._unsorted: list[Message] = []
        self._sorting: Iterator[None] | None = None
        self.ready: deque[Message] = deque()

    def __len__(self) -> int:
        """Messages that wait."""
        return sum(lane.returned for lane in self._lanes) + len(self._unsorted) + len(self.ready)

    def __bool__(self) -> bool:
        return bool(self._lanes or self._unsorted or self.ready)

    def add_lane(self, lane: Lane) -> None:
        """A record of ``lane`` has come back: all of them will."""
        self._lanes[lane] = None

    def add(self, messages: Iterable[Message]) -> None:
        """Messages wait, wherever their numbers put them."""
        self._unsorted += messages

    def defer(self, message: Message) -> None:
        """``message`` found no room: it waits behind all others."""
        self.ready.append(message)

    def sort_some(self, count: int) -> bool:
        """Go on sorting, for ``count`` messages at most; false when there is more to do."""
        if self._sorting is None:
            if not (self._unsorted or self._lanes):
                return True
            self._sorting = self._sort()
        for _ in range(count):
            if next(self._sorting, self) is self:
                self._sorting = None
                return True
        return False

    def _sort(self) -> Iterator[None]:
        """A record a step. A lane counts until the last of its records has been taken out."""
        while self._lanes:
            for lane in sorted(self._lanes, key=lambda lane: lane.number):
                for message in lane.reclaim():
                    self._note_returned(message)
                    self._unsorted.append(message)
                    yield
                del self._lanes[lane]
        self.ready = deque(sorted((*self._unsorted, *self.ready), key=lambda message: message.number))
        self._unsorted.clear()
