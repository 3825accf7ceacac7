"""Cumulative acknowledgement: how many of a connection's first messages are settled.

Reports come in any order when several topics are involved. Messages are numbered from 1 in the order they were taken;
`settled` is the largest n such that messages 1 to n all are. What is settled beyond a gap waits in ``_ahead``, which
holds at most as many numbers as are in flight.
"""

from __future__ import annotations


class Acks:
    """The settled messages of one connection, and how many of them its client has been told of."""

    __slots__ = ("_ahead", "settled", "told")

    def __init__(self) -> None:
        self.settled = 0
        self.told = 0
        self._ahead: set[int] = set()

    def settle(self, index: int) -> bool:
        """Message ``index`` is settled; true when that moved ``settled``."""
        if index != self.settled + 1:
            self._ahead.add(index)
            return False
        ahead = self._ahead
        while index + 1 in ahead:
            index += 1
            ahead.discard(index)
        self.settled = index
        return True
