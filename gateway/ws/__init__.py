"""A WebSocket server on Trio (RFC 6455); knows no Kafka.

`sockets` listens, `listener` accepts, `tls` secures, `upgrade` reads the `request` of a handshake and finds which of
the `endpoints` it is for. From then on `readiness` feeds the `connection`, which cuts `frames` into messages for its
`handler` and lets an `outbox` say what is to be said; `heartbeat` looks after all of them, who are on a `roster`.
"""
