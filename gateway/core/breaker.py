"""The breaker: who does little but what is refused is shut out for a while.

A `Window` counts what came over the last minute and what of it failed; `BreakerRules.trips` says when that is too
much. `Bans` keeps who is shut out until when: `BreakerRules.ban_s`, doubled each time that it happens again, up to
`BreakerRules.max_ban_s`, and from the beginning once `BreakerRules.forgive_s` have passed without.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

WINDOW_S: Final = 60.0
"""How far back the breaker looks."""
SLICE_S: Final = 5.0
"""It looks back by whole slices: as far as `WINDOW_S`, and the part of one that is running."""
MAX_BANS: Final = 65_536
"""Bans remembered, about 300 bytes each. When full, the one that was pronounced longest ago is forgotten."""


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When somebody is shut out, and for how long. A ``share`` of 1 never trips."""

    share: float = 0.5
    """More than this share of what came must have failed."""
    least: int = 20
    """And so much must have come."""
    ban_s: float = 60.0
    max_ban_s: float = 900.0
    forgive_s: float = 3600.0

    def trips(self, came: int, failed: int) -> bool:
        """Whether ``failed`` of ``came`` within a window is too much."""
        return came >= self.least and failed > self.share * came


class Window:
    """What came of one subject over the last minute, and what of it failed.

    Whoever counts calls `roll` when ``slice_ends`` has come, and adds to ``came`` and ``failed``, which are the running
    slice's. All times are in seconds of one steady clock.
    """

    __slots__ = ("_past", "came", "failed", "slice_ends")

    def __init__(self) -> None:
        self.came = 0
        self.failed = 0
        self.slice_ends = 0.0
        self._past: deque[tuple[float, int, int]] | None = None

    def roll(self, now: float) -> None:
        """Begin another slice."""
        if self.came:
            if self._past is None:
                self._past = deque(maxlen=int(WINDOW_S / SLICE_S))
            self._past.append((self.slice_ends, self.came, self.failed))
            self.came = self.failed = 0
        self.slice_ends = now + SLICE_S

    def count(self, now: float, *, came: int = 0, failed: int = 0) -> None:
        """Count so much."""
        if now >= self.slice_ends:
            self.roll(now)
        self.came += came
        self.failed += failed

    def totals(self, now: float) -> tuple[int, int]:
        """What came and what failed within `WINDOW_S` before ``now``."""
        past = [part for part in self._past or () if part[0] > now - WINDOW_S]
        return self.came + sum(part[1] for part in past), self.failed + sum(part[2] for part in past)

    def forget(self) -> None:
        """Begin anew, as after a ban."""
        self.came = self.failed = 0
        self._past = None


K = TypeVar("K")


@dataclass(slots=True)
class _Ban:
    until: float
    length_s: float


class Bans(Generic[K]):
    """Who is shut out, by ``K``. All times are in seconds of one steady clock."""

    def __init__(self, rules: BreakerRules) -> None:
        self.rules = rules
        self._bans: OrderedDict[K, _Ban] = OrderedDict()

    def __len__(self) -> int:
        """Bans remembered, past ones that are not forgiven too."""
        return len(self._bans)

    def use_rules(self, rules: BreakerRules) -> None:
        """Go by other rules from the next ban on."""
        self.rules = rules

    def remaining_s(self, who: K, now: float) -> float:
        """Seconds until ``who`` may come again, 0 when it may."""
        ban = self._bans.get(who)
        return max(0.0, ban.until - now) if ban is not None else 0.0

    def pronounce(self, who: K, now: float) -> float:
        """Shut ``who`` out; return for how many seconds. While a ban lasts it is not pronounced again."""
        rules, old = self.rules, self._bans.pop(who, None)
        if old is not None and old.until > now:
            length_s, until = old.length_s, old.until
        else:
            repeated = old is not None and now - old.until < rules.forgive_s
            length_s = min(rules.max_ban_s, 2 * old.length_s) if old is not None and repeated else rules.ban_s
            until = now + length_s
        self._keep(who, _Ban(until, length_s))
        return until - now

    def learn(self, who: K, remaining_s: float, length_s: float, now: float) -> None:
        """Somebody else has shut ``who`` out; the longer ban counts."""
        old = self._bans.pop(who, None)
        until = now + remaining_s
        if old is not None and old.until > until:
            until, length_s = old.until, old.length_s
        self._keep(who, _Ban(until, length_s))

    def length_s(self, who: K) -> float:
        """How long the last ban of ``who`` was, 0 for none."""
        ban = self._bans.get(who)
        return ban.length_s if ban is not None else 0.0

    def forgive(self, now: float) -> None:
        """Forget the bans that are over and forgiven; some of them, the oldest first, at each call."""
        for who in [who for who, _ in zip(self._bans, range(100), strict=False)]:
            if now - self._bans[who].until < self.rules.forgive_s:
                return
            del self._bans[who]

    def running(self, now: float) -> int:
        """Bans that hold at the moment; looks at each."""
        return sum(ban.until > now for ban in self._bans.values())

    def _keep(self, who: K, ban: _Ban) -> None:
        self._bans[who] = ban
        if len(self._bans) > MAX_BANS:
            self._bans.popitem(last=False)
