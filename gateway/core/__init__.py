"""What the gateway decides, without I/O, clock, logging or Trio: time and keys are passed in.

A handshake: `origins` says which web pages may connect, `admission` whether a connection may come in, `credentials`
turns a token into a `principal`. A message: `envelope` reads and stamps its header, `verdict` says what becomes of it,
by the `routes`. Afterwards: `acks` counts what the client may be told, `notices` words it, `books` keeps the accounts
and `progress` reads alarms out of them. `holds` names what stops reading, `backoff` spaces attempts. `catalogue` is
everything that the gateway says no with.
"""
