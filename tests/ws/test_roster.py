"""Who is connected, found by what is known of them."""

from __future__ import annotations

from dataclasses import dataclass

import trio
import trio.testing

from gateway.core.principal import Principal
from gateway.ws.handler import Link
from gateway.ws.roster import Roster


@dataclass(frozen=True)
class Member:
    connection_id: str
    principal: Principal
    account: str
    connection: Link | None = None


def member(number: int, user: str, company: str, account: str) -> Member:
    return Member(f"c-{number}", Principal(user, company, "pro", 0.0), account)


ALICE_1, ALICE_2 = member(1, "alice", "acme", "11"), member(2, "alice", "acme", "12")
BOB, CAROL = member(3, "bob", "acme", "bob"), member(4, "carol", "other", "11")


def roster() -> Roster[Member]:
    found: Roster[Member] = Roster()
    for one in (ALICE_1, ALICE_2, BOB, CAROL):
        found.add(one)
    return found


def test_members_are_found_by_id_user_company_and_account() -> None:
    found = roster()
    assert found.get("c-3") is BOB
    assert found.get("c-9") is None
    assert found.find(user_id="alice") == [ALICE_1, ALICE_2]
    assert found.find(company_id="acme") == [ALICE_1, ALICE_2, BOB]
    assert found.find(account="11") == [ALICE_1, CAROL]
    assert found.find(company_id="acme", account="11") == [ALICE_1]
    assert found.find(user_id="nobody") == []
    assert found.find() == list(found)


def test_members_may_leave_while_all_are_visited() -> None:
    found = roster()
    for one in found:
        found.discard(one)
        found.discard(one)
    assert len(found) == 0


def test_slices_hold_everybody_once_and_are_not_too_small() -> None:
    found = roster()
    assert found.slices(2, 1) == [[ALICE_1, ALICE_2], [BOB, CAROL]]
    assert found.slices(4, 3) == [[ALICE_1, ALICE_2, BOB], [CAROL]]
    assert Roster[Member]().slices(3, 1) == []


async def test_empty_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    found = roster()
    await Roster[Member]().wait_empty()

    async def leave() -> None:
        for one in found:
            await trio.sleep(1)
            found.discard(one)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        await found.wait_empty()
        assert trio.current_time() >= 4
