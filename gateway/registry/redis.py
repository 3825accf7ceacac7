"""Places in Redis: Lua scripts that check and take in one step, leases that free what a killed gateway held.

The scripts are in ``lua/``; ``common.lua`` says what the keys hold. All keys of a company are in one slot, so that
Redis Cluster works. Needs the ``redis`` extra (coredis).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import coredis
import trio
from coredis.exceptions import NoScriptError
from coredis.retry import NoRetryPolicy

from gateway.core import catalogue
from gateway.core.catalogue import Refusal
from gateway.core.protection import Ban
from gateway.errors import Refused, leaf
from gateway.registry.port import Given, Place, State, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable

    from gateway.core.limits import TierLimits
    from gateway.registry.port import Events

CHANNEL: Final = "gateway:events"
BANS: Final = "gateway:bans"
MAX_BANS: Final = 65_536
"""Bans kept in Redis; beyond it those that end first are forgotten."""


def _keys(company_id: str) -> list[str]:
    tag = f"gateway:{{c:{company_id}}}"
    return [f"{tag}:places", f"{tag}:counts", f"{tag}:leases"]


class _Script:
    """A Lua script, sent whole again when Redis has forgotten it."""

    def __init__(self, *names: str) -> None:
        lua = files("gateway.registry") / "lua"
        self.source = "".join((lua / f"{name}.lua").read_text() for name in names)
        self.sha1 = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_SCRIPTS: Final = {
    **{name: _Script("common", name) for name in ("claim", "release", "renew", "mine", "sync")},
    **{name: _Script(name) for name in ("ban", "bans")},
}


@asynccontextmanager
async def connected(
    url: str, gateway: str, *, lease_s: float, timeout_s: float, cluster: bool = False
) -> AsyncIterator[RedisBackend]:
    """A backend on the Redis at ``url`` (``redis://``, ``rediss://``, ``unix://``), or on the cluster that it is a node
    of. Raises Unavailable."""
    options: dict[str, Any] = {
        "verify_version": False,
        "retry_policy": NoRetryPolicy(),
        "connect_timeout": timeout_s,
        "max_connections": 64,
    }
    client: coredis.Redis[str] | coredis.RedisCluster[str]
    try:
        if cluster:
            client = coredis.RedisCluster.from_url(url, decode_responses=True, **options)
        else:
            client = coredis.Redis.from_url(url, decode_responses=True, **options)
        async with client:
            yield RedisBackend(client, gateway, lease_s=lease_s, timeout_s=timeout_s)
    except (Exception, BaseExceptionGroup) as error:
        raise _unavailable(error) from error


def _unavailable(error: BaseException) -> BaseException:
    """Whatever went wrong in coredis or its tasks as Unavailable: a pool that is being closed raises RuntimeError, an
    answer that is none what its parser makes of it. Of a group with a cancellation, the cancellation alone."""
    if isinstance(error, BaseExceptionGroup):
        _, rest = error.split(Exception)
        if rest is not None:
            return rest
    found = leaf(error)
    return Unavailable(str(found) or type(found).__name__)


class RedisBackend:
    """A `gateway.registry.port.Backend`. Use `connected`."""

    def __init__(
        self, client: coredis.Redis[str] | coredis.RedisCluster[str], gateway: str, *, lease_s: float, timeout_s: float
    ) -> None:
        """``gateway`` names this process among all; ``timeout_s`` bounds every request."""
        self._client = client
        self._gateway = gateway
        self._lease_ms = str(int(lease_s * 1000))
        self._timeout_s = timeout_s

    async def _run(self, name: str, keys: list[str], *arguments: str) -> Any:
        script = _SCRIPTS[name]

        async def run() -> Any:
            try:
                return await self._client.evalsha(script.sha1, keys=keys, args=arguments)
            except NoScriptError:
                return await self._client.eval(script.source, keys=keys, args=arguments)

        return await self._ask(run)

    async def _ask(self, request: Callable[[], Any]) -> Any:
        """One request under the timeout. Raises Unavailable."""
        try:
            with trio.fail_after(self._timeout_s):
                return await request()
        except (Exception, BaseExceptionGroup) as error:
            raise _unavailable(error) from error

    # Places

    async def claim(self, place: Place, limits: TierLimits) -> Given:
        """See `gateway.registry.port.Backend`."""
        answer = await self._run(
            "claim",
            _keys(place.company_id),
            self._gateway,
            self._lease_ms,
            secrets.token_hex(8),
            place.company_id,
            place.connection_id,
            place.user_id,
            place.account,
            str(limits.users),
            str(limits.accounts),
            str(limits.accounts_per_user),
            str(limits.connections_per_account),
        )
        try:
            code, *rest = answer
            if code:
                raise Refused(_refusal(code), "in all gateways")
            epoch, user, company, *replaced = rest
            return Given(str(epoch), int(user), int(company), tuple(map(str, replaced)))
        except (TypeError, ValueError) as error:
            raise Unavailable(f"claim was answered with {type(answer).__name__}") from error

    async def release(self, place: Place) -> None:
        """See `gateway.registry.port.Backend`."""
        await self._run("release", _keys(place.company_id), place.company_id, place.connection_id)

    async def renew(self, company_id: str) -> State:
        """See `gateway.registry.port.Backend`."""
        answer = await self._run("renew", _keys(company_id), self._gateway, self._lease_ms, secrets.token_hex(8))
        try:
            epoch, expired, places = answer
            return State(str(epoch), bool(int(expired)), int(places))
        except (TypeError, ValueError) as error:
            raise Unavailable(f"renew was answered with {type(answer).__name__}") from error

    async def connections(self, company_id: str) -> set[str]:
        """See `gateway.registry.port.Backend`."""
        answer = await self._run("mine", _keys(company_id), self._gateway)
        if not isinstance(answer, list):
            raise Unavailable(f"mine was answered with {type(answer).__name__}")
        return {str(connection) for connection in answer}

    async def sync(self, company_id: str, places: Collection[Place]) -> str:
        """See `gateway.registry.port.Backend`."""
        listed = [text for place in places for text in (place.connection_id, place.user_id, place.account)]
        fixed = (self._gateway, self._lease_ms, secrets.token_hex(8), company_id)
        return str(await self._run("sync", _keys(company_id), *fixed, *listed))

    # Bans

    async def ban(self, ban: Ban) -> None:
        """See `gateway.registry.port.Backend`."""
        body = json.dumps([ban.kind, list(ban.subject), ban.length_s])
        event = json.dumps(["banned", ban.kind, list(ban.subject), ban.remaining_s, ban.length_s])
        await self._run("ban", [BANS], str(ban.remaining_s), body, event, str(MAX_BANS))

    async def bans(self) -> Iterable[Ban]:
        """See `gateway.registry.port.Backend`."""
        answer = await self._run("bans", [BANS])
        if not isinstance(answer, list):
            raise Unavailable(f"bans was answered with {type(answer).__name__}")
        bans = []
        for body, left_ms in zip(answer[::2], answer[1::2], strict=False):
            try:
                kind, subject, length_s = json.loads(body)
                bans.append(Ban(kind, tuple(map(str, subject)), int(left_ms) / 1000, float(length_s)))
            except (TypeError, ValueError):
                continue  # not ours
        return bans

    # Events

    async def listen(self, events: Events) -> None:
        """See `gateway.registry.port.Backend`."""
        try:
            async with self._client.pubsub(channels=[CHANNEL], retry_policy=NoRetryPolicy()) as subscription:
                while True:
                    message = await subscription.get_message(timeout=None)
                    if message is not None and message["type"] == "message":
                        _tell(events, message["data"])
        except (Exception, BaseExceptionGroup) as error:
            raise _unavailable(error) from error


def _tell(events: Events, text: Any) -> None:
    """One event; what is none of ours is left out."""
    try:
        kind, *fields = json.loads(text)
        if kind == "revoked":
            company_id, user_id, connection_id = map(str, fields)
            events.revoked(company_id, user_id, connection_id)
        elif kind == "totals":
            events.totals(str(fields[0]), str(fields[1]), int(fields[2]), int(fields[3]))
        elif kind == "banned":
            events.banned(Ban(fields[0], tuple(map(str, fields[1])), float(fields[2]), float(fields[3])))
    except (TypeError, ValueError, IndexError):
        return


def _refusal(code: object) -> Refusal:
    """The refusal that a script names. Raises ValueError for one that it cannot mean."""
    for refusal in (catalogue.TOO_MANY_USERS, catalogue.TOO_MANY_ACCOUNTS):
        if refusal.code == code:
            return refusal
    raise ValueError(code)
