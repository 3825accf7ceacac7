"""What a dead letter says about the message it holds, in its record's headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.ports import Origin


def headers(origin: Origin, reason: str, received_at: float, gateway: str) -> list[tuple[str, bytes]]:
    """The record headers; ``received_at`` in seconds since the epoch goes out in whole milliseconds."""
    return [
        ("reason", reason.encode()),
        ("user_id", origin.principal.user_id.encode()),
        ("company_id", origin.principal.company_id.encode()),
        ("path", origin.path.encode()),
        ("connection_id", origin.connection_id.encode()),
        ("received_at", str(int(received_at * 1000)).encode()),
        ("gateway", gateway.encode()),
    ]
