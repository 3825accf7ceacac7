"""What a client with a control subprotocol may ask for: a ping, and that a newer token counts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from gateway.core import notices
from gateway.core.controls import ControlRate, parse
from gateway.errors import BadMessage, InvalidToken

if TYPE_CHECKING:
    from typing import Any

    from gateway.core.catalogue import Close
    from gateway.core.controls import Control
    from gateway.core.principal import Principal


class Tokens(Protocol):
    """Which tokens count (`gateway.router.endpoint.Gatekeeper`); asked whenever it matters, so that a reload does."""

    @property
    def leeway_s(self) -> float:
        """How long after its expiry a token still counts, as at the handshake."""

    def verify(self, token: str) -> Principal:
        """Whose token this is. Raises InvalidToken."""

    def is_revoked(self, principal: Principal) -> bool:
        """Whether the token was ended before its time."""


class Asking(Protocol):
    """Whose control messages they are."""

    @property
    def tokens(self) -> Tokens: ...
    @property
    def principal(self) -> Principal: ...
    def renew(self, principal: Principal, /) -> None:
        """A newer token of the same user counts from now on."""


class Controls:
    """Answers one session's control messages. It exists from the first one on."""

    __slots__ = ("_rate", "_session")

    def __init__(self, session: Asking, now: float) -> None:
        self._session = session
        self._rate = ControlRate(now)

    def take(self, text: str, now: float) -> tuple[dict[str, Any], Close | None]:
        """The answer to one message, and the close that follows from it, if any; ``now`` is steady, in seconds."""
        close = None
        try:
            control = parse(text)
            if not self._rate.admit(now):
                answer = notices.error("rate_limited", "too many control messages", control.id)
                return answer, self._rate.floods(now)
            answer = self._answer(control)
        except BadMessage as error:
            if not self._rate.admit(now):
                return notices.error("rate_limited", "too many control messages", error.id), self._rate.floods(now)
            close = self._rate.note_bad(now)
            answer = notices.error("bad_message", str(error), error.id)
        return answer, close

    def _answer(self, control: Control) -> dict[str, Any]:
        if control.kind == "ping":
            return notices.pong(time.time_ns() // 1_000_000, control.id)
        if control.kind == "authenticate":
            return self._authenticate(control)
        return notices.error("unknown_type", "this type is not known here", control.id)

    def _authenticate(self, control: Control) -> dict[str, Any]:
        """Let a newer token count; the old one stays in force when this one does not do."""
        token = control.text("token")
        session = self._session
        try:
            principal = session.tokens.verify(token)
        except InvalidToken:
            return notices.error("invalid_token", "the token does not authenticate", control.id)
        if (principal.user_id, principal.company_id) != (session.principal.user_id, session.principal.company_id):
            return notices.error("other_user", "the token is another user's, or another company's", control.id)
        session.renew(principal)
        return notices.authenticated(int(principal.expires_at), control.id)
