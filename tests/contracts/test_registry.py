"""What a registry promises, in one process or over two gateways on one Redis: never one over, never one too few."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio

from gateway.core import catalogue
from gateway.core.catalogue import Close
from gateway.core.limits import TierLimits
from gateway.core.principal import Principal
from gateway.core.protection import Ban
from gateway.core.tenants import Tenants, User
from gateway.errors import Refused
from gateway.registry import host, parent, port
from gateway.registry.memory import MemoryRegistry
from gateway.registry.port import Registry, Unavailable
from gateway.registry.redis import connected
from gateway.registry.shared import SharedRegistry
from gateway.telemetry.metrics import Metrics
from tests.redis_server import RedisServer

LIMITS = TierLimits(users=3, accounts=5, accounts_per_user=2, connections_per_account=1)


class Place:
    """A connection that notes when it loses its place."""

    def __init__(self, number: int, account: str) -> None:
        self.connection_id = f"c-{number}"
        self.account = account
        self.revoked: list[Close] = []

    def revoke(self, close: Close, /) -> None:
        self.revoked.append(close)


class Log:
    def __init__(self) -> None:
        self.events: list[str] = []

    def info(self, event: str, **fields: Any) -> None:
        self.events.append(event)

    error = warning = info


class Gateway:
    """One process: its tenants and its registry."""

    def __init__(self, registry: Callable[[Tenants, Log], Registry], limits: TierLimits) -> None:
        self.tenants, self.log, self.bans = Tenants({"pro": limits}), Log(), list[Ban]()
        self.registry = registry(self.tenants, self.log)

    def user(self, name: str, company: str = "acme") -> User:
        who = Principal(name, company, "pro", 4e9)
        self.tenants.learn_tier(who)
        return self.tenants.user(who, 0.0)


class House:
    """The gateways of a test, and how their places come and go."""

    def __init__(self, gateways: list[Gateway], server: RedisServer | None) -> None:
        self.gateways = gateways
        self.server = server
        self._numbers = iter(range(1_000_000))

    async def claim(self, name: str, account: str = "", *, at: int = 0) -> tuple[Gateway, User, Place]:
        gateway = self.gateways[at % len(self.gateways)]
        user, place = gateway.user(name), Place(next(self._numbers), account or name)
        await gateway.registry.claim(user, place)
        return gateway, user, place

    def release(self, held: tuple[Gateway, User, Place]) -> None:
        gateway, user, place = held
        gateway.registry.release(user, place)

    async def refused(self, name: str, account: str = "", *, at: int = 0) -> str:
        with pytest.raises(Refused) as refused:
            await self.claim(name, account, at=at)
        return refused.value.refusal.code


def shared(url: str, name: str, tenants: Tenants, log: Log, **options: Any) -> SharedRegistry:
    settings: dict[str, Any] = {"refuse": False, "lease_s": 3.0, **options}
    return SharedRegistry(
        "redis",
        tenants,
        MemoryRegistry(tenants, trio.current_time),
        lambda: connected(url, name, lease_s=settings["lease_s"], timeout_s=1.0),
        Metrics(),
        log,  # type: ignore[arg-type]  # a stand-in
        **settings,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@asynccontextmanager
async def over_redis(server: RedisServer, limits: TierLimits = LIMITS, **options: Any) -> AsyncIterator[House]:
    if server.command("PING") != "+PONG":
        server.start()
    server.command("FLUSHALL")
    gateways = [Gateway(partial(shared, server.url, f"gateway-{number}", **options), limits) for number in range(2)]
    async with trio.open_nursery() as nursery:
        for gateway in gateways:
            assert isinstance(gateway.registry, SharedRegistry)
            gateway.registry.attach(gateway.bans.append)
            nursery.start_soon(gateway.registry.run)
        with trio.fail_after(60):
            await until(lambda: all(one.registry.up for one in gateways))  # type: ignore[attr-defined]  # as above
            yield House(gateways, server)
        nursery.cancel_scope.cancel()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await trio.sleep(0.01)


Open = Callable[..., Any]


@asynccontextmanager
async def over_parent(limits: TierLimits = LIMITS) -> AsyncIterator[House]:
    async with host.serving() as path, trio.open_nursery() as nursery:

        def make(tenants: Tenants, log: Log) -> SharedRegistry:
            return SharedRegistry(
                "parent",
                tenants,
                MemoryRegistry(tenants, trio.current_time),
                lambda: parent.connected(path, timeout_s=1.0),
                Metrics(),
                log,  # type: ignore[arg-type]  # a stand-in
                refuse=False,
                lease_s=3.0,
            )

        gateways = [Gateway(make, limits) for _ in range(2)]
        for gateway in gateways:
            assert isinstance(gateway.registry, SharedRegistry)
            gateway.registry.attach(gateway.bans.append)
            nursery.start_soon(gateway.registry.run)
        with trio.fail_after(60):
            await until(lambda: all(one.registry.up for one in gateways))  # type: ignore[attr-defined]  # as above
            yield House(gateways, None)
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["memory", "parent", pytest.param("redis", marks=pytest.mark.redis)])
def house(request: pytest.FixtureRequest) -> Open:
    if request.param == "parent":
        return over_parent
    if request.param == "redis":
        return partial(over_redis, request.getfixturevalue("server"))

    @asynccontextmanager
    async def in_memory(limits: TierLimits = LIMITS) -> AsyncIterator[House]:
        gateway = Gateway(lambda tenants, _: MemoryRegistry(tenants, trio.current_time), limits)
        yield House([gateway], None)

    return in_memory


async def test_limits_hold_over_all_gateways_and_places_come_back(house: Open) -> None:
    async with house() as it:
        alice = await it.claim("alice", "1", at=0)
        await it.claim("alice", "2", at=1)
        assert await it.refused("alice", "3", at=0) == "too_many_accounts"
        await it.claim("bob", at=1)
        await it.claim("carol", at=0)
        assert await it.refused("dave", at=0) == await it.refused("dave", at=1) == "too_many_users"
        await it.claim("bob", "another", at=0)
        assert await it.refused("carol", "another", at=1) == "too_many_accounts", "five of the company"
        it.release(alice)
        await trio.sleep(0.2)
        await it.claim("carol", "another", at=1)


async def test_newer_connection_of_an_account_replaces_the_older_wherever_it_is(house: Open) -> None:
    async with house() as it:
        _, _, older = await it.claim("alice", "1", at=0)
        _, _, other = await it.claim("bob", "1", at=0)
        _, _, newer = await it.claim("alice", "1", at=1)
        await until(lambda: bool(older.revoked))
        assert (older.revoked, other.revoked, newer.revoked) == ([catalogue.CLOSE_REPLACED], [], [])


async def test_never_one_over_and_never_one_too_few_in_a_storm(house: Open) -> None:
    limits = TierLimits(users=20)
    async with house(limits) as it:
        for _ in range(3):
            held: list[tuple[Gateway, User, Place]] = []
            codes: list[str] = []

            async def attempt(number: int) -> None:
                try:
                    held.append(await it.claim(f"user-{number}", at=number))  # noqa: B023  # this round's
                except Refused as refused:
                    codes.append(refused.refusal.code)  # noqa: B023  # this round's

            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(attempt, number)
            assert len(held) == 20
            assert set(codes) == {"too_many_users"}
            for one in held:
                it.release(one)
            await trio.sleep(0.5)


async def test_random_comings_and_goings_keep_to_the_limits(house: Open) -> None:
    chance = random.Random(11)
    async with house() as it:
        held: list[tuple[Gateway, User, Place]] = []
        for _ in range(150):
            if held and chance.random() < 0.4:
                it.release(held.pop(chance.randrange(len(held))))
                await trio.sleep(0.02)
            else:
                with suppress(Refused):
                    held.append(await it.claim(chance.choice("abcd"), chance.choice("123"), at=chance.randrange(2)))
                await trio.sleep(0.02)
            held = [one for one in held if not one[2].revoked]
            users = {user.user_id for _, user, _ in held}
            accounts = {(user.user_id, place.account) for _, user, place in held}
            assert len(users) <= 3
            assert len(accounts) <= 5
            assert len(accounts) == len(held)
        for one in held:
            it.release(one)
        await trio.sleep(0.5)
        for name in ("x", "y", "z"):
            await it.claim(name, at=1)


# Several processes


@pytest.fixture(params=["parent", pytest.param("redis", marks=pytest.mark.redis)])
def several(request: pytest.FixtureRequest) -> Open:
    return over_parent if request.param == "parent" else partial(over_redis, request.getfixturevalue("server"))


async def test_rates_are_shared_by_the_connections_of_a_user(several: Open) -> None:
    async with several(TierLimits()) as it:
        (_, here, _), (_, there, second) = await it.claim("alice", "1", at=0), await it.claim("alice", "2", at=1)
        await until(lambda: here.share == there.share == 0.5)
        await it.claim("alice", "3", at=1)
        await until(lambda: abs(here.share - 1 / 3) < 0.01 and abs(there.share - 2 / 3) < 0.01)
        it.gateways[1].registry.release(there, second)
        await until(lambda: here.share == there.share == 0.5)


async def test_ban_is_known_to_the_others(several: Open) -> None:
    async with several() as it:
        ban = Ban("user", ("acme", "mallory"), 30.0, 60.0)
        it.gateways[0].registry.ban(ban)  # a shared one
        await until(lambda: ban in it.gateways[1].bans)


async def test_places_of_a_worker_that_ends_are_free_at_once_and_bans_outlast_it() -> None:
    async with host.serving() as path:
        async with parent.connected(path, timeout_s=1) as first:
            await first.claim(registry_place("alice", "c-1"), TierLimits(users=1))
            await first.ban(Ban("user", ("acme", "mallory"), 30.0, 60.0))
            with pytest.raises(Refused):
                await first.claim(registry_place("bob", "c-2"), TierLimits(users=1))
        async with parent.connected(path, timeout_s=1) as second:
            with trio.fail_after(5):
                while True:
                    try:
                        await second.claim(registry_place("bob", "c-2"), TierLimits(users=1))
                    except Refused:
                        await trio.sleep(0.01)
                    else:
                        break
            (ban,) = await second.bans()
            assert ban.subject == ("acme", "mallory")
            assert await second.connections("acme") == {"c-2"}


async def test_parent_that_ends_is_unavailable_and_one_that_gets_nonsense_lives() -> None:
    async with host.serving() as path:
        async with await trio.open_unix_socket(path) as stranger:
            await stranger.send_all(b'[1,"claim"]\nnonsense\n')
            await trio.sleep(0.05)
        async with parent.connected(path, timeout_s=1) as backend:
            await backend.claim(registry_place("alice", "c-1"), TierLimits())
    with pytest.raises(Unavailable):
        async with parent.connected(path, timeout_s=1):
            raise AssertionError("nobody is there")


def registry_place(user: str, connection_id: str) -> port.Place:
    return port.Place("acme", user, user, connection_id)


# Redis alone


@pytest.mark.redis
async def test_bans_are_known_everywhere_those_too_of_before(server: RedisServer) -> None:
    async with over_redis(server) as it:
        ban = Ban("user", ("acme", "mallory"), 30.0, 60.0)
        it.gateways[0].registry.ban(ban)  # type: ignore[attr-defined]  # a shared one
        await until(lambda: ban in it.gateways[1].bans)
        late = Gateway(partial(shared, server.url, "late"), LIMITS)
        assert isinstance(late.registry, SharedRegistry)
        late.registry.attach(late.bans.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late.registry.run)
            await until(lambda: bool(late.bans))
            nursery.cancel_scope.cancel()
        assert late.bans[0].subject == ("acme", "mallory")
        assert 25 < late.bans[0].remaining_s <= 30


@pytest.mark.redis
async def test_places_of_a_killed_gateway_are_free_after_its_lease(server: RedisServer) -> None:
    async with over_redis(server, TierLimits(users=1)) as it:
        async with trio.open_nursery() as nursery:
            killed = Gateway(partial(shared, server.url, "killed"), TierLimits(users=1))
            assert isinstance(killed.registry, SharedRegistry)
            nursery.start_soon(killed.registry.run)
            await until(lambda: killed.registry.up)  # type: ignore[attr-defined]  # as above
            await killed.registry.claim(killed.user("alice"), Place(1_000_000, "alice"))
            nursery.cancel_scope.cancel()
        assert await it.refused("bob") == "too_many_users"
        await trio.sleep(3.2)
        await it.claim("bob")


@pytest.mark.redis
async def test_what_goes_on_while_redis_is_away_is_registered_when_it_is_back_empty(server: RedisServer) -> None:
    async with over_redis(server, TierLimits(users=2)) as it:
        await it.claim("alice", at=0)
        server.kill()
        await it.claim("bob", at=1)
        gateway = it.gateways[1]
        assert not gateway.registry.up  # type: ignore[attr-defined]  # a shared one
        assert "registry does not answer" in gateway.log.events
        server.start()
        await until(lambda: all(one.registry.up for one in it.gateways))  # type: ignore[attr-defined]  # as above
        assert await it.refused("carol", at=0) == await it.refused("carol", at=1) == "too_many_users"


@pytest.mark.redis
async def test_with_refuse_nobody_gets_in_while_redis_stands_still(server: RedisServer) -> None:
    async with over_redis(server, refuse=True) as it:
        held = await it.claim("alice")
        server.stop_answering()
        try:
            assert await it.refused("bob") == "registry_unavailable"
            began = trio.current_time()
            assert await it.refused("bob") == "registry_unavailable"
            assert trio.current_time() - began < 0.5, "it is not asked again for each"
            it.release(held)
        finally:
            server.go_on()
        await until(lambda: it.gateways[0].registry.up)  # type: ignore[attr-defined]  # a shared one
        await it.claim("bob")


@pytest.mark.redis
@pytest.mark.parametrize(
    "trouble",
    [
        ("SCRIPT", "FLUSH"),
        ("REPLICAOF", "127.0.0.1", "1"),
        ("CONFIG", "SET", "maxmemory", "1"),
        ("FLUSHALL",),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("CLIENT", "KILL", "TYPE", "pubsub"),
    ],
)
async def test_trouble_with_redis_ends_nothing_and_is_mended(server: RedisServer, trouble: tuple[str, ...]) -> None:
    async with over_redis(server, TierLimits(users=2)) as it:
        alice = await it.claim("alice", at=0)
        server.command(*trouble)
        await trio.sleep(0.1)
        await it.claim("bob", at=1)
        await trio.sleep(2)
        server.command("REPLICAOF", "NO", "ONE")
        server.command("CONFIG", "SET", "maxmemory", "0")
        await trio.sleep(3)
        await until(lambda: all(one.registry.up for one in it.gateways))  # type: ignore[attr-defined]  # shared ones
        assert await it.refused("carol", at=0) == await it.refused("carol", at=1) == "too_many_users"
        assert not alice[2].revoked, "who is open stays"


@pytest.mark.redis
async def test_place_that_was_taken_while_nobody_listened_is_given_up(server: RedisServer) -> None:
    async with over_redis(server) as it:
        _, _, older = await it.claim("alice", "1", at=0)
        async with connected(server.url, "other", lease_s=30, timeout_s=1) as other:
            await other.renew("acme")
            places = [name for name in ("gateway:{c:acme}:places",) if server.command("EXISTS", name) == ":1"]
            assert places
            server.command("HDEL", places[0], older.connection_id)
            server.command("HINCRBY", "gateway:{c:acme}:counts", "g:gateway-0", "-1")
            await until(lambda: bool(older.revoked))


@pytest.mark.redis
@pytest.mark.filterwarnings("ignore:Use coredis.connection.TCPLocation:DeprecationWarning")  # its own from_url does not
async def test_cluster_of_redis_does_as_well() -> None:
    with RedisServer("--cluster-enabled", "yes") as server:
        assert server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383") == "+OK"
        with trio.fail_after(20):
            while "state:ok" not in server.lines("CLUSTER", "INFO"):
                await trio.sleep(0.05)
            async with connected(server.url, "one", lease_s=5, timeout_s=2, cluster=True) as backend:
                await backend.claim(registry_place("alice", "c-1"), TierLimits(users=1))
                with pytest.raises(Refused):
                    await backend.claim(registry_place("bob", "c-2"), TierLimits(users=1))
                heard: list[Ban] = []

                class Hearing(SharedEvents):
                    def banned(self, ban: Ban) -> None:
                        heard.append(ban)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(backend.listen, Hearing())
                    while not heard:
                        await backend.ban(Ban("user", ("acme", "mallory"), 30.0, 60.0))
                        await trio.sleep(0.1)
                    nursery.cancel_scope.cancel()
                assert [ban.subject for ban in await backend.bans()] == [("acme", "mallory")]
                assert await backend.connections("acme") == {"c-1"}


class SharedEvents:
    """Who is told of what others do, and does not mind."""

    def revoked(self, company_id: str, user_id: str, connection_id: str) -> None:
        return

    def totals(self, company_id: str, user_id: str, user_connections: int, company_connections: int) -> None:
        return


async def test_worker_whose_connection_to_its_parent_broke_registers_its_places_again() -> None:
    async with over_parent(TierLimits(users=2)) as it:
        _, _, alice = await it.claim("alice", at=0)
        registry = it.gateways[0].registry
        assert isinstance(registry, SharedRegistry)
        backend = registry._backend
        assert isinstance(backend, parent.ParentBackend)
        await backend._lines.aclose()
        await until(lambda: not registry.up)
        await until(lambda: registry.up)
        await trio.sleep(1.5)
        assert not alice.revoked
        await it.claim("bob", at=1)
        assert await it.refused("carol", at=1) == "too_many_users"


async def test_many_places_at_once_cut_nobody_off() -> None:
    async with (
        host.serving() as address,
        parent.connected(address, timeout_s=5) as one,
        parent.connected(address, timeout_s=5) as two,
    ):
        await two.claim(registry_place("x", "x-1"), TierLimits())
        places = [registry_place(f"user-{number % 100}", f"c-{number}") for number in range(12_000)]
        for _ in range(2):
            await one.sync("acme", places)
        assert (await one.renew("acme")).places == 12_000
        assert await two.connections("acme") == {"x-1"}
