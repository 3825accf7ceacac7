"""A WebSocket router daemon: authenticated MT5 tick clients in, Kafka records out.

Every flow is one folder, reads in the order in which things happen, and joins two transports that do not know each
other. The way up (`router`), of one message::

    socket ─► frames ─► header ─► verdict ─► producer queue ─► Kafka ─► report ─► ack
                                     └─────► dead-letter topic ─► spool ─► (next start)

1. `ws.listener` accepts and gives each socket one task; `ws.upgrade` reads the handshake under a deadline and finds the
   `ws.endpoints` it is for; `router.endpoint` turns the token into a principal.
2. `ws.readiness`, one epoll for all, feeds each `ws.connection` whose socket has something to read; `ws.frames` yields
   whole messages, and its handler, a `router.session`, takes them.
3. `core.envelope` reads the header, `core.verdict` says where the message goes and what is stamped on.
4. `kafka.producer` queues the bytes; the `router.lanes` remember what is under way, and Kafka's reports settle it.
5. What fails has one of the `router.fates`, and `router.delivery` does what they say: queued again, a dead letter
   (`router.deadletters`), or on the disk (`router.spool`).
6. `core.books` know where every message is; what was settled is acked (`router.talk`), gathered by `ws.heartbeat`.

The rooms: `core` decides, without I/O; `ws` and `kafka` are the transports, which never import each other; `router`
joins them. `ops` is what operators see, `telemetry` what is counted and logged, `config` what is set. `daemon` joins
everything into a process, or several, and only it sees all of it. `client` is the other side; `cli` is what is typed;
`testing` is for tests, benches and `demo`. `tests/test_structure.py` holds all of that.
"""
