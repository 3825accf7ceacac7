"""What operators see: `status` is what a daemon says of itself, `asgi` answers with it, `serve` serves that on
hypercorn.

`probe` asks such a sidecar, `aggregate` makes one page of metrics out of several processes'.
"""
