"""A process: `materials` are read, `assemble` joins the parts, `run` is their life and `drain` its end.

`flow` is where backpressure lives, `lifecycle` the state, `operations` what may be asked of a running daemon (first by
`signals`), `reload` how new settings are taken, `systemd` what the service manager hears, `announce` what whoever
started it hears. `workers` runs several of them: each has a place (`worker`), gets `orders`, and is added up by `host`.
"""
