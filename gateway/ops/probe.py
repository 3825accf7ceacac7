"""Asks a sidecar, this process' own kind."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Final

_open: Final = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # loopback needs no proxy


def fetch(url: str, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of a GET; blocks. Raises OSError, ValueError and http.client.HTTPException."""
    try:
        with _open(url, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:  # 503 is an answer too
        with error:
            return error.code, error.read()
