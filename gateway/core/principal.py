"""Who is connected."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated user. ``expires_at`` is in seconds since the epoch; ``tier`` is free, pro or enterprise."""

    user_id: str
    company_id: str
    tier: str
    expires_at: float
