"""Which trading pairs a user streams, as far as somebody has looked.

The gateway does not read payloads on their way. Where the operator wants it, it looks into one message a second of each
connection: a sample, good for finding who streams many pairs for long, not for counting them at any moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

LOOK_S: Final = 1.0
"""Between two looks into messages of one connection."""
FORGET_S: Final = 60.0
"""A pair that was not seen for this long is streamed no longer."""
PATIENCE_S: Final = 60.0
"""Who is over the limit for this long, whatever it is told, is shut out."""
QUIET_S: Final = 10.0
"""Who was not found over the limit for this long begins anew."""
MAX_PAIRS: Final = 10_000
"""Pairs remembered of one user, about 120 bytes each."""


class Pairs:
    """The pairs of one user. All times are in seconds of one steady clock."""

    __slots__ = ("_over_at", "_over_since", "_seen")

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._over_at = 0.0
        self._over_since: float | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, symbols: Iterable[str], limit: int, now: float) -> bool:
        """These have been seen; whether there are more than ``limit`` now, 0 for none."""
        seen = self._seen
        for symbol in symbols:
            if symbol in seen or len(seen) < MAX_PAIRS:
                seen[symbol] = now
        if not limit or len(seen) <= limit:
            self._over_since = None
            return False
        self._seen = {symbol: at for symbol, at in seen.items() if now - at < FORGET_S}
        if len(self._seen) <= limit:
            self._over_since = None
            return False
        if self._over_since is None or now - self._over_at > QUIET_S:
            self._over_since = now
        self._over_at = now
        return True

    def is_out_of_patience(self, now: float) -> bool:
        """Whether it has been over the limit for `PATIENCE_S`."""
        return self._over_since is not None and now - self._over_since >= PATIENCE_S
