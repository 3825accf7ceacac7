"""Who is connected."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated user. Times are in seconds since the epoch; ``tier`` is free, pro or enterprise."""

    user_id: str
    company_id: str
    tier: str
    """As the token says; what holds is its company's (`gateway.core.tenants.Company`)."""
    expires_at: float
    issued_at: float = 0.0
    token_id: str | None = None
    """The token's ``jti`` (RFC 7519 4.1.7)."""
