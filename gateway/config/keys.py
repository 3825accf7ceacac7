"""Key files, read and checked: what fails names the setting and the file, never the key.

Everything here is read again on SIGHUP; a file that cannot be used leaves what was loaded before in place.
"""

from __future__ import annotations

import json
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate

from gateway.config.files import BYTE_ORDER_MARK, read_file, without_line_ending
from gateway.core.credentials import TokenRules, VerifyKey
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gateway.config.settings import AuthSettings

MIN_SECRET_BYTES: Final = 32  # RFC 7518 3.2: a key of at least the hash's size
_MIN_RSA_BITS: Final = 2048  # RFC 7518 3.3


def token_rules(settings: AuthSettings, skipped: list[str] | None = None, unseen: Collection[str] = ()) -> TokenRules:
    """Load every configured key but those whose settings are ``unseen``. Raises ConfigError with all that is unusable.

    Keys of a JWKS that are of no use here are no fault (RFC 7517 5); why they were left out is added to ``skipped``.
    """
    faults: list[str] = []
    keys: list[VerifyKey] = []
    left_out = [] if skipped is None else skipped
    loads: dict[str, Callable[[AuthSettings], list[VerifyKey]]] = {
        "auth.secret_file": _secret,
        **{f"auth.public_keys.{at}.file": partial(_public_key, at) for at in range(len(settings.public_keys))},
        "auth.jwks_file": partial(_jwks, left_out),
    }
    for setting, load in loads.items():
        try:
            keys += load(settings) if setting not in unseen else []
        except ConfigError as error:
            faults += error.faults
    for algorithm in settings.algorithms if not loads.keys() & set(unseen) else ():
        if not faults and not any(key.algorithm == algorithm for key in keys):
            faults.append(f"auth.algorithms: no key for {algorithm}")
    revoked: frozenset[str] = frozenset()
    try:
        if "auth.revoked_file" not in unseen:
            revoked = _revoked(settings)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    not_before = settings.not_before.timestamp() if settings.not_before is not None else 0.0
    return TokenRules(tuple(keys), settings.issuer, settings.audience, settings.leeway_s, not_before, revoked)


def _revoked(settings: AuthSettings) -> frozenset[str]:
    """The ``jti`` of revoked tokens: one a line, empty lines and those that begin with # left out."""
    if settings.revoked_file is None:
        return frozenset()
    where = f"auth.revoked_file: {settings.revoked_file}"
    try:
        text = read_file(where, settings.revoked_file).removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise ConfigError([f"{where}: not UTF-8"]) from error
    lines = (line.strip() for line in text.splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))


def read_secret(settings: AuthSettings) -> bytes | None:
    """The HS256 secret, None when there is none. Raises ConfigError."""
    where, secret = "auth.secret", b""
    if settings.secret is not None:
        secret = settings.secret.get_secret_value().encode()
    elif settings.secret_file is not None:
        where = f"auth.secret_file: {settings.secret_file}"
        secret = without_line_ending(read_file(where, settings.secret_file))
    else:
        return None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError([f"{where}: a secret of at least {MIN_SECRET_BYTES} bytes is needed"])
    return secret


def _secret(settings: AuthSettings) -> list[VerifyKey]:
    secret = read_secret(settings)
    if secret is None:
        return []
    try:
        key = jwt.get_algorithm_by_name("HS256").prepare_key(secret)
    except jwt.InvalidKeyError as error:
        raise ConfigError(["auth: the secret is a public key or a certificate"]) from error
    return [VerifyKey("HS256", key, settings.secret_kid)]


def _public_key(index: int, settings: AuthSettings) -> list[VerifyKey]:
    entry = settings.public_keys[index]
    where = f"auth.public_keys.{index}.file: {entry.file}"
    pem = read_file(where, entry.file)
    if pem.count(b"-----BEGIN ") > 1:
        raise ConfigError([f"{where}: holds more than one PEM block; give each key an entry and a file of its own"])
    try:
        if b"BEGIN CERTIFICATE" in pem:
            key: Any = load_pem_x509_certificate(pem).public_key()
        else:
            key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError([f"{where}: not a PEM public key"]) from error
    return [_bind(where, key, entry.kid, settings)]


def _jwks(skipped: list[str], settings: AuthSettings) -> list[VerifyKey]:
    if settings.jwks_file is None:
        return []
    where = f"auth.jwks_file: {settings.jwks_file}"
    text = read_file(where, settings.jwks_file)
    try:
        entries = json.loads(text.removeprefix(BYTE_ORDER_MARK).decode())["keys"]
        if not isinstance(entries, list):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError([f"{where}: not a JWKS (RFC 7517)"]) from error
    keys = []
    for number, entry in enumerate(entries):
        kid = entry.get("kid") if isinstance(entry, dict) else None
        name = f"{where}: key {number if kid is None else repr(kid)}"
        try:
            keys.append(_jwk(name, entry, settings))
        except ConfigError as error:
            skipped += error.faults
    if not keys:
        raise ConfigError([f"{where}: holds no key that is of use here", *skipped])
    return keys


def _jwk(name: str, entry: Any, settings: AuthSettings) -> VerifyKey:
    """One entry of a JWKS. Raises ConfigError with why it is of no use here."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str | NoneType):
        raise ConfigError([f"{name}: not a JWK (RFC 7517 4)"])
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise ConfigError([f"{name}: not for verifying signatures"])
    if entry.get("kty") == "oct":
        raise ConfigError([f"{name}: a shared secret: use auth.secret_file"])
    try:
        found = jwt.PyJWK.from_dict(entry)
    except Exception as error:  # PyJWT lets TypeError, AttributeError and others through for odd JSON
        raise ConfigError([f"{name}: not a key this gateway knows (kty {entry.get('kty')!r})"]) from error
    key = _bind(name, found.key, entry.get("kid"), settings)
    if entry.get("alg", key.algorithm) not in (key.algorithm, "Ed25519"):
        raise ConfigError([f"{name}: for {entry['alg']!r}, not for {key.algorithm}"])
    return key


def _bind(where: str, key: Any, kid: str | None, settings: AuthSettings) -> VerifyKey:
    """Bind a public key to the one algorithm of its kind (RFC 8725 3.1)."""
    if isinstance(key, RSAPublicKey):
        algorithm = "RS256"
        if key.key_size < _MIN_RSA_BITS:
            raise ConfigError([f"{where}: RSA key of {key.key_size} bits; {_MIN_RSA_BITS} are needed"])
    elif isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        algorithm = "ES256"
    elif isinstance(key, Ed25519PublicKey | Ed448PublicKey):
        algorithm = "EdDSA"
    else:
        raise ConfigError([f"{where}: not an RSA, P-256 or EdDSA public key"])
    if algorithm not in settings.algorithms:
        raise ConfigError([f"{where}: a key for {algorithm}, which auth.algorithms does not name"])
    return VerifyKey(algorithm, key, kid)
