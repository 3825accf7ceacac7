"""The sidecar's ASGI application: health, metrics, version. Plain ASGI, no framework, no state of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope

_JSON: Final = b"application/json"
_TEXT: Final = b"text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The application. ``reasons`` lists why the gateway is not ready; ``details`` is for ``/health``."""

    reasons: Callable[[], list[str]]
    details: Callable[[], dict[str, Any]]
    metrics: Callable[[], bytes]
    version: dict[str, str]

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Answer one request (ASGI 3.0)."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        upgrade = scope["type"] == "websocket"  # answered like the request that it also is: nothing is upgraded here
        method = "GET" if scope["type"] == "websocket" else scope["method"]
        if scope["http_version"] not in ("1.0", "1.1"):
            error = {"code": "http_version_not_supported", "message": "Only HTTP/1.1 is served here."}
            status, content_type, body = _json(505, {"error": error})
        else:
            status, content_type, body = self._answer(method, scope["path"])
        headers = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        if status == 405:
            headers.append((b"allow", b"GET, HEAD"))
        if upgrade:
            await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
            await send({"type": "websocket.http.response.body", "body": body, "more_body": False})
            return
        await send({"type": "http.response.start", "status": status, "headers": headers, "trailers": False})
        if method != "GET":
            body = b"" if status != 405 else body
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _answer(self, method: str, path: str) -> tuple[int, bytes, bytes]:
        path = path.rstrip("/")
        if path not in ("/health/live", "/health/ready", "/health", "/metrics", "/version"):
            return _json(404, {"error": {"code": "not_found", "message": "There is nothing at this path."}})
        if method not in ("GET", "HEAD") and not (method == "OPTIONS" and _is_health(path)):
            return _json(405, {"error": {"code": "method_not_allowed", "message": "GET and HEAD only."}})
        if path == "/metrics":
            return 200, _TEXT, self.metrics()
        if path == "/version":
            return _json(200, self.version)
        if path == "/health/live":
            return _json(200, {"status": "live"})
        reasons = self.reasons()
        status = 503 if reasons else 200
        ready = {"status": "not_ready" if reasons else "ready", "reasons": reasons}
        if path == "/health/ready":
            return _json(status, ready)
        return _json(status, {"live": True, "ready": not reasons, "reasons": reasons, **self.details()})


def _is_health(path: str) -> bool:
    """Whether balancers check this path: HAProxy's default check is an OPTIONS."""
    return path == "/health" or path.startswith("/health/")


def _json(status: int, value: Any) -> tuple[int, bytes, bytes]:
    return status, _JSON, json.dumps(value).encode()


async def _lifespan(receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    while True:
        event = await receive()
        if event["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return
