"""A WebSocket router daemon: authenticated MT5 tick clients in, Kafka records out.

The way of one message::

    socket ─► frames ─► envelope header ─► route ─► producer queue ─► Kafka ─► delivery report ─► ack
                                  └──────► dead-letter topic ─► spool ─► (next start)

1. `ingress.listener` accepts and gives each socket one task; `ingress.handshake` reads the upgrade under a deadline,
   and `core.principal` turns its token into a `Principal`.
2. `ingress.readiness`, one epoll for all, calls `feed` of each `ingress.session` whose socket has something to read;
   `ingress.frames` yields whole messages.
3. `core.envelope` reads the header and stamps by appending; `core.routing` knows the topic.
4. `egress.delivery` hands the bytes to `egress.producer` and moves them through `core.books` when Kafka has answered.
5. What was settled is acked, gathered by `ingress.heartbeat`.

``ingress`` and ``egress`` never import each other, ``core`` imports neither and does no I/O; `app` joins them.

Around it: `__main__` takes the signals before anything else is imported, `cli` says what the command line means,
`config` and `keys` what the settings mean, `running` how a fault of any kind ends a program. `app` is the daemon,
`lifecycle` its states; `workers` runs several of them, each told by `orders` on its standard input. `sockets` listens,
`threads` runs what blocks, `status` says how the daemon is.
"""
