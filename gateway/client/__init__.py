"""Clients of the gateway on trio-websocket.

`connect` is one connection (`connection`). `open_client` (`sender`) is what a program wants that must not lose
anything: it keeps every message until the gateway has acked it (it is in Kafka then), reconnects with growing, jittered
delays or when the gateway said (`backoff`), and sends again what is not acked. At least once: a message whose ack was
lost with its connection is sent twice. `stream` and `ticks` are for files of ticks.

    async with open_client("wss://gateway.example:8001/ws/mt5", token, account="5012345") as client:
        await client.send("tick_data", batch.SerializeToString())
        await client.flush()
"""

from gateway.client.backoff import Backoff
from gateway.client.connection import Connection, connect, tls_context
from gateway.client.sender import MAX_UNACKED, GatewayClient, open_client

__all__ = ["MAX_UNACKED", "Backoff", "Connection", "GatewayClient", "connect", "open_client", "tls_context"]
