"""What the gateway decides, without I/O, clock, logging or Trio: time and keys are passed in.

`principal` turns a token into an identity, `origins` says which web pages may connect, `admission` whether a
connection may come in; `envelope` reads and stamps a message's header, `routing` names its topic, `control` words what
the client is told, `acks` counts what it may be told, `books` keeps the accounts and `progress` reads alarms out of
them. `ports` names what this side needs of the Kafka side.
"""
