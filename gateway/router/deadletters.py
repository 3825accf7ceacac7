"""What a dead letter says about the message it holds, in its record's headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.core.catalogue import Reason

if TYPE_CHECKING:
    from gateway.router.messages import Headers, Message


def headers(message: Message, reason: Reason, gateway: str) -> Headers:
    """The headers of a dead letter that ``gateway`` makes of ``message``; ``received_at`` is in milliseconds since the
    epoch."""
    sender = message.sender
    return [
        ("reason", reason.encode()),
        ("user_id", sender.principal.user_id.encode()),
        ("company_id", sender.principal.company_id.encode()),
        ("path", sender.path.encode()),
        ("connection_id", sender.connection_id.encode()),
        ("received_at", str(message.arrived_at_ms).encode()),
        ("gateway", gateway.encode()),
    ]


def reason_of(headers: Headers) -> Reason:
    """The reason that a dead letter's headers give."""
    return Reason.of(dict(headers).get("reason", b"").decode(errors="replace"))
