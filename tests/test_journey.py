"""The whole journey: ticks from a file, through a real client, TLS, the daemon and Kafka, to a real consumer."""

from __future__ import annotations

import json
import signal
import ssl
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway import client
from gateway.client.stream import Pace, stream
from gateway.client.ticks import COLUMNS, read
from gateway.testing import devkeys
from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient, frame
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope
from gateway.v1.ticks_pb2 import BatchTickData, Tick
from tests.conftest import Broker

# Real feeds hold equal times, identical rows, crossed quotes and zeros.
ROWS = [
    "1399507200036,NZDUSD,0.86478,0.86503,0",
    "1399507200042,XAUUSD,1290.33,1290.66,0",
    "1399507200042,XAUUSD,1290.33,1290.66,0",
    "1399507200042,XAUUSD,1290.31,1290.30,0",
    "1399507200099,EURUSD,0,0,0",
    "1399507201000,BTCUSD,24849.4,24921.5,13",
]
OANDA = Path(__file__).parent.parent.parent / "shared" / "data" / "ticks" / "lean_oanda_20140508.csv.gz"


@pytest.fixture
def tick_file(tmp_path: Path) -> Path:
    path = tmp_path / "ticks.csv"
    path.write_text("\n".join([",".join(COLUMNS), *ROWS * 50]) + "\n")
    return path


def ticks_in(values: list[bytes]) -> list[Tick]:
    return [
        tick for value in values for tick in BatchTickData.FromString(MessageEnvelope.FromString(value).payload).ticks
    ]


async def test_every_tick_is_in_kafka_once_and_in_order(
    start_daemon: Callable[..., Daemon], broker: Broker, tick_file: Path, tmp_path: Path
) -> None:
    ca, certificate, key = devkeys.write_certificate(tmp_path, "localhost", "127.0.0.1")
    daemon = start_daemon(
        broker.bootstrap_servers, settings={"tls.cert_file": str(certificate), "tls.key_file": str(key)}
    )
    with Records(broker.bootstrap_servers, "tick-data") as records:
        done = await stream(
            tick_file,
            daemon.url,
            daemon.token("streamer", "acme"),
            pace=Pace(rate=0, batch=7),
            account="5012345",
            tls=client.tls_context(daemon.url, ca),
        )
        found = records.take(done.messages, key="streamer")
        assert records.nothing_more(key="streamer")
    assert (done.ticks, done.rejected, done.reconnects) == (300, 0, 0)
    values = [record.value() or b"" for record in found]
    assert len({record.partition() for record in found}) == 1
    assert ticks_in(values) == list(read(tick_file))
    envelope = MessageEnvelope.FromString(values[0])
    assert (envelope.user_id, envelope.company_id) == ("streamer", "acme")
    assert BatchTickData.FromString(envelope.payload).account == "5012345"
    assert daemon.stop() == 0
    assert '"imbalance": 0' in daemon.log()
    assert '"received": 43, "delivered": 43' in daemon.log()


@pytest.mark.apache
@pytest.mark.skipif(not OANDA.exists(), reason=f"{OANDA.name} is not beside the project; CI has it")
async def test_a_day_of_real_ticks_is_in_kafka_once_and_in_order(
    start_daemon: Callable[..., Daemon], apache_broker: Broker
) -> None:
    daemon = start_daemon(apache_broker.bootstrap_servers)
    with Records(apache_broker.bootstrap_servers, "tick-data") as records:
        done = await stream(OANDA, daemon.url, daemon.token("oanda"), pace=Pace(rate=0))
        values = [record.value() or b"" for record in records.take(done.messages, key="oanda", timeout_s=60)]
        assert records.nothing_more(key="oanda")
    assert done.ticks == 336_830
    arrived = iter(ticks_in(values))
    assert all(tick == next(arrived) for tick in read(OANDA))
    assert next(arrived, None) is None


async def test_wrong_certificate_is_refused_by_the_client(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    _, certificate, key = devkeys.write_certificate(tmp_path, "localhost", "127.0.0.1")
    daemon = start_daemon(settings={"tls.cert_file": str(certificate), "tls.key_file": str(key)})
    with pytest.raises(ssl.SSLCertVerificationError):
        RawClient(daemon.url, tls=ssl.create_default_context())
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        RawClient(daemon.url, tls=old)
    relaxed = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    relaxed.check_hostname, relaxed.verify_mode = False, ssl.CERT_NONE
    with RawClient(daemon.url, tls=relaxed) as patient:
        patient.upgrade(daemon.token())
        patient.send_binary(MessageEnvelope(message_type="tick_data", payload=b"x" * 60_000).SerializeToString())
        patient.ping()
        assert patient.close()[0] == 1000


def test_frames_in_one_tls_record_with_the_request_are_taken_at_once(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    ca, certificate, key = devkeys.write_certificate(tmp_path, "localhost", "127.0.0.1")
    daemon = start_daemon(settings={"tls.cert_file": str(certificate), "tls.key_file": str(key)})
    message = MessageEnvelope(message_type="tick_data", user_id="eager", company_id="acme", payload=bytes(100))
    with Records(daemon.kafka, "tick-data") as records:
        with RawClient(daemon.url, tls=ssl.create_default_context(cafile=ca)) as eager:
            head = "".join(f"{name}: {value}\r\n" for name, value in eager.headers(daemon.token("eager")))
            frames = frame(0x2, message.SerializeToString()) * 60 + frame(0x9, b"last")
            eager.sock.sendall(f"GET /ws/mt5 HTTP/1.1\r\n{head}\r\n".encode() + frames)
            assert eager.read_response().status == 101
            assert eager.read_frame() == (0xA, b"last")
        assert len(records.take(60, key="eager")) == 60


def test_resets_before_the_tls_handshake_are_ordinary(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    _, certificate, key = devkeys.write_certificate(tmp_path, "localhost")
    daemon = start_daemon(settings={"tls.cert_file": str(certificate), "tls.key_file": str(key)})
    for _ in range(30):
        RawClient(daemon.url).reset()
    deadline = time.monotonic() + 10
    while True:
        metrics = daemon.get("/metrics")[1]
        if 'gateway_handshakes_total{outcome="tls_failed"} 30.0' in metrics:
            break
        assert time.monotonic() < deadline, metrics
        time.sleep(0.2)
    assert 'gateway_handshakes_total{outcome="error"} 0.0' in metrics
    assert "Traceback" not in daemon.log()


def test_a_reload_of_anything_never_ends_the_daemon(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    bad: list[dict[str, object]] = [
        {"auth__secret_file": "a\0b"},
        {"kafka__properties": {"message.max.bytes": "much"}},
        {"tls__cert_file": "a.pem", "tls__key_file": "b.pem"},
    ]
    good = dict(daemon._settings)
    for number, change in enumerate(bad, 1):
        daemon.reconfigure(**change)
        daemon.signal(signal.SIGHUP)
        deadline = time.monotonic() + 10
        while daemon.log().count("reload failed") < number:
            assert time.monotonic() < deadline, daemon.log()
            time.sleep(0.02)
        daemon._settings = dict(good)
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())
        client.ping()


def test_tls_client_that_never_speaks_is_closed(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    _, certificate, key = devkeys.write_certificate(tmp_path, "localhost")
    daemon = start_daemon(
        settings={
            "tls.cert_file": str(certificate),
            "tls.key_file": str(key),
            "listen.handshake_timeout_s": 1,
        }
    )
    with RawClient(daemon.url) as silent, RawClient(daemon.url) as plain:
        plain.sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        plain.expect_end()
        silent.expect_end()
    assert daemon.get("/health/ready")[0] == 200


def test_sigterm_drains_with_notice_close_and_flush(start_daemon: Callable[..., Daemon], broker: Broker) -> None:
    daemon = start_daemon(broker.bootstrap_servers)
    with Records(broker.bootstrap_servers, "tick-data") as records, RawClient(daemon.url) as connection:
        connection.upgrade(daemon.token("drained"), protocols="gateway.v1.json")
        message = MessageEnvelope(message_type="tick_data", user_id="drained", company_id="acme")
        for _ in range(500):
            connection.send_binary(message.SerializeToString())
        connection.ping()
        daemon.signal(signal.SIGTERM)
        notice = connection.read_control("closing")
        assert notice["code"] == 1012
        assert 0 <= notice["reconnect_after_ms"] <= 5000
        assert connection.read_close()[0] == 1012
        connection.send_binary(message.SerializeToString())
        connection.send_frame(0x8, b"\x03\xf4")
        connection.expect_end()
        assert daemon.process is not None
        assert daemon.process.wait(30) == 0
        assert len(records.take(501, key="drained")) == 501
        assert records.nothing_more(key="drained")
    assert '"received": 501, "delivered": 501' in daemon.log()


def test_a_second_signal_stops_at_once(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"session.close_timeout_s": 60, "drain.close_timeout_s": 60})
    with RawClient(daemon.url) as stubborn:
        stubborn.upgrade(daemon.token())
        daemon.signal(signal.SIGTERM)
        assert stubborn.read_close()[0] == 1012
        status, body = daemon.get("/health/ready")
        assert status == 503
        assert "draining" in body
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.process is not None
        daemon.process.wait(10)
        assert time.monotonic() - began < 5


def test_drain_ends_in_time_when_clients_do_not_answer(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"drain.close_timeout_s": 1, "session.close_timeout_s": 30})
    with RawClient(daemon.url) as stubborn:
        stubborn.upgrade(daemon.token())
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 10


def test_what_kafka_did_not_confirm_by_the_end_of_a_drain_is_counted_and_said_where_there_is_no_spool(
    start_daemon: Callable[..., Daemon],
) -> None:
    from gateway.testing.daemon import Daemon as Running

    with Running(settings={"log.level": "warning"}) as host:
        daemon = start_daemon(host.kafka, settings={"drain.flush_timeout_s": 1, "spool.directory": ""})
        with RawClient(daemon.url) as connection:
            connection.upgrade(daemon.token())
            host.signal(signal.SIGSTOP)  # Kafka stops answering
            try:
                for _ in range(10):
                    connection.send_binary(MessageEnvelope(message_type="tick_data").SerializeToString())
                connection.ping()
                assert daemon.stop() == 1
            finally:
                host.signal(signal.SIGCONT)
    assert "drain ran out of time" in daemon.log()
    assert '"dropped": 10' in daemon.log()
    assert '"imbalance": 0' in daemon.log()


def test_sighup_takes_new_routes_keys_certificate_and_level(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    ca, certificate, key = devkeys.write_certificate(tmp_path, "localhost", "127.0.0.1")
    daemon = start_daemon(settings={"tls.cert_file": str(certificate), "tls.key_file": str(key)})
    old_tls = ssl.create_default_context(cafile=ca)

    def wait_for(text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 10
        while daemon.log().count(text) < times:
            assert time.monotonic() < deadline, daemon.log()
            time.sleep(0.02)

    message = MessageEnvelope(message_type="heartbeat", user_id="alice", company_id="acme").SerializeToString()
    with RawClient(daemon.url, tls=old_tls) as connection:
        old_token = daemon.token()
        connection.upgrade(old_token, protocols="gateway.v1.json")
        connection.send_binary(message)
        assert connection.read_control("rejected")["reason"] == "unknown_message_type"

        new = tmp_path / "new"
        new.mkdir()
        new_ca, new_certificate, new_key = devkeys.write_certificate(new, "localhost", "127.0.0.1")
        daemon.secret = b"another secret that is long enough to be one"
        (daemon.home / "secret").write_bytes(daemon.secret)
        daemon.reconfigure(
            tls__cert_file=str(new_certificate),
            tls__key_file=str(new_key),
            routes__topics={"heartbeat": "heartbeats"},
            log__level="debug",
        )
        daemon.signal(signal.SIGHUP)
        wait_for('"event": "reloaded"')
        with Records(daemon.kafka, "heartbeats") as records:
            connection.send_binary(message)
            assert records.take(1, key="alice")[0].value() == message, "an open connection uses the new routes"
        new_tls = ssl.create_default_context(cafile=new_ca)
        with RawClient(daemon.url, tls=new_tls) as fresh:
            assert fresh.request(fresh.headers(old_token)).status == 401
        with RawClient(daemon.url, tls=new_tls) as fresh:
            fresh.upgrade(daemon.token())

        new_certificate.write_text("no certificate")
        daemon.reconfigure(routes__topics={"heartbeat": "bad topic!"})
        daemon.signal(signal.SIGHUP)
        wait_for("reload failed")
        assert "routes.topics.heartbeat" in daemon.log()
        daemon.reconfigure(routes__topics={"heartbeat": "heartbeats"})
        daemon.signal(signal.SIGHUP)
        wait_for("reload failed", 2)
        with RawClient(daemon.url, tls=new_tls) as fresh:
            fresh.upgrade(daemon.token())
        connection.ping()
    assert json.loads(daemon.get("/health")[1])["messages"]["imbalance"] == 0
