"""Cumulative acknowledgement: how many of a connection's first messages are settled.

Reports come in any order when several topics are involved. Messages are numbered from 1 in the order they were taken;
`settled` is the largest n such that messages 1 to n all are. What is settled beyond a gap is kept as runs, so memory
follows the messages that are not settled, not those that wait behind one of them.
"""

from __future__ import annotations


class Acks:
    """The settled messages of one connection, and how many of them its client has been told of."""

    __slots__ = ("_first_of", "_last_of", "settled", "told")

    def __init__(self) -> None:
        self.settled = 0
        self.told = 0
        self._last_of: dict[int, int] = {}  # runs beyond the gap: first number to last
        self._first_of: dict[int, int] = {}  # and last to first

    def settle(self, index: int) -> bool:
        """Message ``index`` is settled; true when there is something to tell the client now, and was not before."""
        if index == self.settled + 1:
            news = self.settled == self.told
            self.settled = index
            if self._last_of and index + 1 in self._last_of:
                self.settled = self._last_of.pop(index + 1)
                del self._first_of[self.settled]
            return news
        first = self._first_of.pop(index - 1, index)
        last = self._last_of.pop(index + 1, index)
        self._last_of[first] = last
        self._first_of[last] = first
        return False

    def tell(self) -> None:
        """The client is being told of all that is settled."""
        self.told = self.settled

    @property
    def runs(self) -> int:
        """Runs of settled messages beyond the first gap."""
        return len(self._last_of)
