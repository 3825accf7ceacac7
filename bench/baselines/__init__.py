"""The same work done by others, for `bench.compare`: small and idiomatic, none of the gateway's promises beyond it.

Each program listens on ``BASELINE_PORT``, verifies an HS256 JWT signed with ``BASELINE_SECRET`` at the handshake, reads
each message's envelope, refuses one that names somebody else, and produces it to the topic of its type, keyed by user,
through an idempotent producer with lz4 and a linger of 5 ms; delivery reports are counted. It prints ``ready`` and,
after SIGTERM and a flush, ``{"received": n, "delivered": n}``.
"""
