"""The HTTP surface for operators: `asgi` answers, `server` serves it on hypercorn."""
