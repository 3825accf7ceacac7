"""What a dead letter says about the message it holds, in its record's headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.ports import Origin


def headers(origin: Origin, reason: str, received_at_ms: int, gateway: str) -> list[tuple[str, bytes]]:
    """The record headers; ``received_at`` is in milliseconds since the epoch."""
    return [
        ("reason", reason.encode()),
        ("user_id", origin.principal.user_id.encode()),
        ("company_id", origin.principal.company_id.encode()),
        ("path", origin.path.encode()),
        ("connection_id", origin.connection_id.encode()),
        ("received_at", str(received_at_ms).encode()),
        ("gateway", gateway.encode()),
    ]
