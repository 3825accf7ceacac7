"""What sessions hold back meets what waits for room: nothing overtakes, nothing is left behind, at a drain neither."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from gateway.config.settings import DrainSettings
from gateway.core.books import Books
from gateway.core.progress import Progress
from gateway.core.protection import Protection
from gateway.core.routes import Routes
from gateway.daemon.drain import Drain
from gateway.daemon.flow import Flow
from gateway.kafka.partitioner import partition_of
from gateway.router.delivery import Delivery
from gateway.router.inspection import Inspection
from gateway.router.session import Session, SessionContext
from gateway.router.spool.segments import Spool
from gateway.telemetry.logging import RateLimited
from gateway.telemetry.metrics import Metrics
from gateway.testing.producer import FakeProducer
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.ws.readiness import Readiness
from tests.router.stand_ins import ALICE, AnyToken, nobody_trips, user_of

PARTITION = ("tick-data", partition_of(b"alice", 4))


def message(number: int) -> bytes:
    return MessageEnvelope(
        message_type="tick_data", user_id="alice", company_id="acme", payload=b"%08d" % number, timestamp=1
    ).SerializeToString()


class Way:
    """Everything between a session and a producer that is a stand-in, as a daemon joins it."""

    def __init__(self, directory: Path) -> None:
        quiet = RateLimited(lambda *_, **__: None, trio.current_time)
        self.readiness = Readiness()
        self.flow = Flow(self.readiness, Progress())
        self.producer = FakeProducer(holds=self.flow)
        self.producer.cluster.partition_counts["tick-data"] = 4
        self.books = Books()
        self.delivery = Delivery(
            self.producer,  # type: ignore[arg-type]  # a stand-in
            Routes({"tick_data": "tick-data"}, "failed-messages"),
            self.books,
            Metrics(),
            gateway="test",
            log_failed=quiet,
            spool=Spool(directory, 1 << 30),
            holds=self.flow,
        )
        context = SessionContext(
            readiness=self.readiness,
            delivery=self.delivery,
            inspection=Inspection(Metrics()),
            throttled=lambda *_: None,
            ack_interval_ms=200,
            reconnect_window_ms=0,
            tokens=AnyToken(),
            trip=nobody_trips,
            protection=Protection(),
            notify=lambda session: None,
            log_rejected=quiet,
            log_crash=quiet,
        )
        self.session = Session(
            context,
            self,
            connection_id="c-1",
            principal=ALICE,
            user=user_of(),
            account="alice",
            path="/",
            subprotocol=None,
        )

    def leave(self, session: Session, outcome: str) -> None:
        """Nobody counts."""

    def renewed(self, session: Session) -> None:
        """Nobody is told."""

    def park(self, count: int) -> None:
        """``count`` messages are under way when their partition turns out to take nothing: as `KafkaProducer.run`."""
        self.session.received([message(number) for number in range(count)])
        self.producer.note_broken("takes nothing")
        self.delivery.note_unwritable(frozenset({PARTITION}))
        self.producer._purge()
        self.producer.broken = ""
        while len(self.producer) or self.delivery._waitlist:
            self.producer.poll()
        assert len(self.delivery) == count

    def confirmed(self) -> list[int]:
        return [int(MessageEnvelope.FromString(record.record_value).payload) for record in self.producer.confirmed]


class Calm:
    """Activity that is told already."""

    async def finish(self) -> None:
        return


@asynccontextmanager
async def way(directory: Path) -> AsyncIterator[Way]:
    it = Way(directory)
    assert it.delivery.spool is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.readiness.run)
        nursery.start_soon(it.delivery.spool.run)
        with trio.fail_after(20):
            yield it
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("parked", [5, 5000])
async def test_what_was_parked_goes_first_when_its_partition_is_whole_again(tmp_path: Path, parked: int) -> None:
    async with way(tmp_path) as it:
        it.park(parked)
        it.session.received([message(number) for number in range(parked, parked + 3)])
        assert it.session.backlog == 3, "its user waits alone"
        it.delivery.note_unwritable(frozenset())
        await trio.testing.wait_all_tasks_blocked()  # sessions may come before the producer's next turn
        while len(it.producer.confirmed) < parked + 3:
            it.producer.poll()
            await trio.testing.wait_all_tasks_blocked()
        assert it.confirmed() == [*range(parked + 3)]


@pytest.mark.parametrize("parked", [500, 5000])
async def test_drain_spools_what_is_parked_and_what_waits_behind_it(tmp_path: Path, parked: int) -> None:
    async with way(tmp_path) as it:
        it.park(parked)
        it.session.received([message(number) for number in range(100)])
        assert it.session.backlog == 100
        lines: list[Any] = []
        log = SimpleNamespace(
            **dict.fromkeys(("info", "warning", "error"), lambda event, **fields: lines.append((event, fields)))
        )
        settings = SimpleNamespace(drain=DrainSettings(timeout_s=8, grace_s=0, close_window_s=0))
        daemon = SimpleNamespace(
            settings=settings,
            log=log,
            kafka=SimpleNamespace(
                delivery=it.delivery, producer=it.producer, replay=None, books=it.books, activity=Calm()
            ),
            ws=SimpleNamespace(readiness=it.readiness, sessions=[]),
        )
        drain = Drain(daemon, trio.Event())  # type: ignore[arg-type]  # the parts that it looks at here
        began = trio.current_time()
        await drain.give_up()
        assert trio.current_time() - began < 4, "it does not wait for its deadline"
        assert drain.account() == 0, lines
        assert it.books.totals().spooled == parked + 100
        assert not it.readiness.paused
