"""``gateway token``: a token for trials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import cyclopts
from cyclopts import Parameter

from gateway.cli.common import ConfigFile
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from gateway.config import AuthSettings


def token(
    *,
    user: str,
    company: str = "",
    tier: Literal["free", "pro", "enterprise"] = "free",
    ttl: Annotated[int, Parameter(validator=cyclopts.validators.Number(gt=0))] = 3600,
    config_file: ConfigFile = None,
    private_key: Path | None = None,
    algorithm: Literal["RS256", "ES256", "EdDSA"] | None = None,
    kid: str | None = None,
    issuer: str | None = None,
    audience: str | None = None,
) -> int:
    """Print a development token.

    Parameters
    ----------
    user
        The user_id: sub, and the key of every record.
    company
        The company_id.
    tier
        The subscription tier.
    ttl
        Seconds until it expires.
    config_file
        Sign with this file's HS256 secret, issuer and audience. Without it, with the development secret.
    private_key
        Sign with this PEM private key instead; needs --algorithm.
    algorithm
        What the private key is for.
    kid
        Name the key in the token's header.
    issuer
        iss, when it is not the configured one.
    audience
        aud, when it is not the configured one.
    """
    import time

    from gateway.core.credentials import mint

    if (private_key is None) != (algorithm is None):
        raise ConfigError(["--private-key and --algorithm belong together"])
    auth = _auth(config_file, needs_secret=private_key is None)
    now = int(time.time())
    try:
        print(
            mint(
                algorithm=algorithm or "HS256",
                key=_key(auth, private_key),
                user_id=user,
                company_id=company,
                tier=tier,
                issuer=issuer or auth.issuer,
                audience=audience or auth.audience,
                kid=kid or (auth.secret_kid if private_key is None else None),
                issued_at=now,
                expires_at=now + ttl,
            )
        )
    except (ValueError, TypeError) as error:
        raise ConfigError([f"--private-key {private_key}: not a PEM private key for {algorithm}"]) from error
    return 0


def _auth(config_file: Path | None, *, needs_secret: bool) -> AuthSettings:
    """Whose token it is to be: the file's, or the development secret's."""
    from pydantic import SecretStr

    from gateway import config
    from gateway.testing import devkeys

    if config_file is not None:
        return config.load(config_file).auth
    path = devkeys.ensure_secret() if needs_secret else None
    return config.AuthSettings(
        secret_file=str(path.absolute()) if path else None, secret=None if path else SecretStr("unused")
    )


def _key(auth: AuthSettings, private_key: Path | None) -> bytes:
    from gateway.config import keys

    if private_key is not None:
        try:
            return private_key.read_bytes()
        except OSError as error:
            raise ConfigError([f"--private-key {private_key}: {error.strerror}"]) from error
    secret = keys.read_secret(auth)
    if secret is None:
        raise ConfigError(["the configuration has no HS256 secret: give --private-key and --algorithm"])
    return secret
