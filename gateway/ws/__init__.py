"""The way in, in the order a connection takes it.

`listener` accepts a socket and opens its one task. `handshake` reads the HTTP upgrade (`request`
parses it), authenticates and answers. `connection` is the WebSocket connection from then on: its task
sleeps while `readiness` calls its synchronous `feed` whenever bytes have arrived and `frames` cuts them into
messages. `session` is the connection that routes what it receives. `heartbeat` looks after all of them.
"""
