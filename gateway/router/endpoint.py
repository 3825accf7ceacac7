"""The endpoint of the way up: who may come in at the handshake, and what their connection becomes."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from gateway.core import catalogue
from gateway.core.notices import CONTROL_SUBPROTOCOLS
from gateway.errors import InvalidToken, Refused
from gateway.ws.endpoints import Granted
from gateway.ws.upgrade import bearer_token

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.core.credentials import TokenRules
    from gateway.core.principal import Principal
    from gateway.ws.endpoints import Asked

_ACCOUNT = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class Identity(NamedTuple):
    """Who was admitted. ``account`` is the MT5 account, the user_id when none was named."""

    principal: Principal
    account: str
    path: str


class Gatekeeper:
    """Authorises handshakes by their token. What it goes by may be replaced while running."""

    def __init__(self, rules: TokenRules, *, allow_query_token: bool) -> None:
        self._rules = rules
        self._allow_query_token = allow_query_token

    def use_rules(self, rules: TokenRules, *, allow_query_token: bool) -> None:
        """Go by other rules from now on."""
        self._rules, self._allow_query_token = rules, allow_query_token

    @property
    def leeway_s(self) -> float:
        """How long after its expiry a token still counts."""
        return self._rules.leeway_s

    def verify(self, token: str) -> Principal:
        """Whose token this is, now. Raises InvalidToken."""
        return self._rules.authenticate(token, time.time())

    def is_revoked(self, principal: Principal) -> bool:
        """Whether the token was ended before its time."""
        return self._rules.is_revoked(principal)

    def authorise(self, asked: Asked) -> Granted:
        """Account first, then the token. Raises Refused; reads the clock, touches no socket."""
        account = _account(asked.query)
        token, subprotocol = bearer_token(asked, in_query=self._allow_query_token)
        try:
            principal = self.verify(token)
        except InvalidToken as error:
            raise Refused(catalogue.INVALID_TOKEN, error.reason) from None
        identity = Identity(principal, account or principal.user_id, sys.intern(asked.request.path))
        return Granted(identity, subprotocol, text=subprotocol in CONTROL_SUBPROTOCOLS)


def _account(query: Mapping[str, list[str]]) -> str | None:
    accounts = query.get("account")
    if accounts is None:
        return None
    if len(accounts) != 1 or not _ACCOUNT.match(accounts[0]):
        raise Refused(catalogue.BAD_ACCOUNT)
    return accounts[0]
