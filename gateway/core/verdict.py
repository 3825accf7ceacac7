"""What becomes of a message, judged by its header alone.

`judge` is the whole rule. It looks at the header of one message, and what it says holds for every message with the same
header. Where that goes out as it came, a session does not ask again while the header repeats
(`gateway.core.envelope.Pattern`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gateway.core import catalogue
from gateway.core.envelope import identity_stamp

if TYPE_CHECKING:
    from gateway.core.catalogue import Reason
    from gateway.core.principal import Principal
    from gateway.core.routes import Routes
    from gateway.v1.envelope_pb2 import MessageEnvelope


class Verdict(NamedTuple):
    """Where a message goes, and what is appended to it.

    Without a ``reason`` it goes to ``topic`` as a message of ``message_type``, with ``stamp`` appended and, if
    ``traced``, a correlation id of its own. With a ``reason`` it becomes a dead letter, as it came.
    """

    topic: str = ""
    message_type: str = ""
    stamp: bytes = b""
    traced: bool = False
    reason: Reason | None = None

    @property
    def plain(self) -> bool:
        """It goes to its topic as it came."""
        return self.reason is None and not self.stamp and not self.traced


NOT_AN_ENVELOPE = Verdict(reason=catalogue.REASON_NOT_AN_ENVELOPE)
"""The verdict on what does not parse."""


def foreign(envelope: MessageEnvelope, principal: Principal) -> Reason | None:
    """The reason to refuse an envelope that names somebody else, None when it may pass; empty fields may."""
    if envelope.user_id not in ("", principal.user_id):
        return catalogue.REASON_FOREIGN_USER
    if envelope.company_id not in ("", principal.company_id):
        return catalogue.REASON_FOREIGN_COMPANY
    return None


def judge(envelope: MessageEnvelope, principal: Principal, routes: Routes) -> Verdict:
    """The verdict on a message with this header from ``principal``; its payload and its time do not count.

    Identity comes first: what names somebody else is a dead letter whatever its type is. Empty fields are stamped.
    """
    reason = foreign(envelope, principal)
    if reason is not None:
        return Verdict(reason=reason)
    topic = routes.topics.get(envelope.message_type)
    if topic is None:
        return Verdict(reason=catalogue.REASON_UNKNOWN_TYPE)
    traced = envelope.enable_tracing and not envelope.correlation_id
    return Verdict(topic, envelope.message_type, identity_stamp(envelope, principal), traced)
