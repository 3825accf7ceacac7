"""Clients written by others, over WSS with a private CA: each sends, each is heard by Kafka, each closes cleanly."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
import trio
import trio_websocket
import websocket
import websockets.sync.client

from gateway.testing import devkeys
from gateway.testing.daemon import Daemon
from gateway.testing.records import Records
from gateway.v1.envelope_pb2 import MessageEnvelope

COUNT = 20


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return devkeys.write_certificate(tmp_path_factory.mktemp("tls"), "localhost", "127.0.0.1")


@pytest.fixture(scope="module")
def secured(certificates: tuple[Path, Path, Path]) -> Iterator[Daemon]:
    _, certificate, key = certificates
    with Daemon(settings={"tls.cert_file": str(certificate), "tls.key_file": str(key)}) as running:
        yield running


def message(user: str, number: int) -> bytes:
    return MessageEnvelope(
        message_type="tick_data", user_id=user, company_id="acme", payload=b"%d" % number
    ).SerializeToString()


Client = Callable[[Daemon, str, Path], None]


def with_websockets(daemon: Daemon, user: str, ca: Path) -> None:
    with websockets.sync.client.connect(
        daemon.url,
        ssl=ssl.create_default_context(cafile=ca),
        additional_headers={"Authorization": f"Bearer {daemon.token(user)}"},
        subprotocols=["gateway.v1.json"],  # type: ignore[list-item]  # its NewType of str
    ) as connection:
        assert json.loads(connection.recv())["user_id"] == user
        for number in range(COUNT):
            connection.send(message(user, number))
        connection.ping().wait(10)
    assert connection.close_code == 1000


def with_aiohttp(daemon: Daemon, user: str, ca: Path) -> None:
    async def talk() -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(
                daemon.url,
                ssl=ssl.create_default_context(cafile=ca),
                protocols=("bearer", daemon.token(user)),
                compress=15,
            ) as connection,
        ):
            assert connection.protocol == "bearer"
            assert not connection.compress
            for number in range(COUNT):
                await connection.send_bytes(message(user, number))
            await connection.close()
            assert connection.close_code == 1000
        await asyncio.sleep(
            0.25
        )  # aiohttp's documentation, "Graceful Shutdown": TLS transports close after the session

    asyncio.run(talk())


def with_websocket_client(daemon: Daemon, user: str, ca: Path) -> None:
    connection = websocket.create_connection(
        daemon.url,
        sslopt={"ca_certs": str(ca)},
        header=[f"Authorization: Bearer {daemon.token(user)}"],
        timeout=10,
    )
    for number in range(COUNT):
        connection.send_binary(message(user, number))
    connection.ping("x")
    assert connection.recv_data_frame(control_frame=True)[0] == websocket.ABNF.OPCODE_PONG
    connection.close()


def with_trio_websocket(daemon: Daemon, user: str, ca: Path) -> None:
    async def talk() -> None:
        async with trio_websocket.open_websocket_url(
            daemon.url,
            ssl_context=ssl.create_default_context(cafile=ca),
            extra_headers=[(b"Authorization", b"Bearer " + daemon.token(user).encode())],
        ) as connection:
            for number in range(COUNT):
                await connection.send_message(message(user, number))
            await connection.ping()
        assert connection.closed is not None
        assert connection.closed.code == 1000

    trio.run(talk)


NODE_CLIENT = """
const WebSocket = require('ws');
const [url, token, ca, ...messages] = process.argv.slice(2);
const socket = new WebSocket(url, {
  ca: require('fs').readFileSync(ca), headers: {Authorization: 'Bearer ' + token}, perMessageDeflate: true });
socket.on('open', () => {
  if (socket.extensions) throw new Error('compression was accepted');
  for (const message of messages) socket.send(Buffer.from(message, 'hex'));
  socket.ping('x');
});
socket.on('pong', () => socket.close(1000));
socket.on('close', (code) => process.exit(code === 1000 ? 0 : 1));
socket.on('error', (error) => { console.error(error); process.exit(2); });
"""


def with_node_ws(daemon: Daemon, user: str, ca: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed; CI runs this")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gateway" / "node-ws"
    if not (cache / "node_modules" / "ws").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "ws@8"], cwd=cache, check=True)
    script = cache / "client.js"
    script.write_text(NODE_CLIENT)
    messages = [message(user, number).hex() for number in range(COUNT)]
    done = subprocess.run(
        ["node", str(script), daemon.url, daemon.token(user), str(ca), *messages],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "client", [with_websockets, with_aiohttp, with_websocket_client, with_trio_websocket, with_node_ws]
)
def test_client_is_served(secured: Daemon, certificates: tuple[Path, Path, Path], client: Client) -> None:
    user = client.__name__
    with Records(secured.kafka, "tick-data") as records:
        client(secured, user, certificates[0])
        values = [record.value() for record in records.take(COUNT, key=user)]
        assert records.nothing_more(key=user)
    assert values == [message(user, number) for number in range(COUNT)]
