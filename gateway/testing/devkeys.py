"""Keys for trying the gateway out on one machine: a secret in the user's state directory, a throw-away certificate.

Nothing here is for production, where the API gateway signs the tokens and an operator brings the certificate.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trustme

from gateway.core.credentials import mint
from gateway.errors import StartupError

if TYPE_CHECKING:
    from gateway.config import AuthSettings


def secret_path() -> Path:
    """Where the development secret is kept: ``$XDG_STATE_HOME/gateway/dev-secret``."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "gateway" / "dev-secret"


def ensure_secret() -> Path:
    """The development secret's file, made (mode 0600) when it is not there. Raises StartupError."""
    path = secret_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(48))
    return path


def write_certificate(directory: Path, *names: str) -> tuple[Path, Path, Path]:
    """Make a private CA and a certificate for ``names``; return the paths of CA, certificate chain and key."""
    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    ca, certificate, key = directory / "ca.pem", directory / "server.pem", directory / "server.key"
    authority.cert_pem.write_to_path(str(ca))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.touch(mode=0o600)
    key.write_bytes(issued.private_key_pem.bytes())
    return ca, certificate, key


def mint_with_secret(
    settings: AuthSettings, secret: bytes, *, user_id: str, company_id: str, tier: str, ttl_s: int
) -> str:
    """An HS256 token that a gateway with ``settings`` accepts, valid from now for ``ttl_s`` seconds."""
    now = int(time.time())
    return mint(
        algorithm="HS256",
        key=secret,
        user_id=user_id,
        company_id=company_id,
        tier=tier,
        issuer=settings.issuer,
        audience=settings.audience,
        kid=settings.secret_kid,
        issued_at=now,
        expires_at=now + ttl_s,
    )
