"""Key and certificate files, read and checked: what fails names the setting and the file, never the key.

Everything here is read again on SIGHUP; a file that cannot be used leaves what was loaded before in place.
"""

from __future__ import annotations

import json
import ssl
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate, load_pem_x509_certificates

from gateway.config import BYTE_ORDER_MARK, MIN_SECRET_BYTES, without_line_ending
from gateway.core.credentials import TokenRules, VerifyKey
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gateway.config import AuthSettings, TlsSettings

_MIN_RSA_BITS = 2048  # RFC 7518 3.3


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
    if faults:
        raise ConfigError(faults)
    return TokenRules(tuple(keys), settings.issuer, settings.audience, settings.leeway_s)


def read_secret(settings: AuthSettings) -> bytes | None:
    """The HS256 secret, None when there is none. Raises ConfigError."""
    where, secret = "auth.secret", b""
    if settings.secret is not None:
        secret = settings.secret.get_secret_value().encode()
    elif settings.secret_file is not None:
        where = f"auth.secret_file: {settings.secret_file}"
        secret = without_line_ending(_read(where, settings.secret_file))
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


def _read(where: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ConfigError([f"{where}: {getattr(error, 'strerror', None) or error}"]) from error


def _public_key(index: int, settings: AuthSettings) -> list[VerifyKey]:
    entry = settings.public_keys[index]
    where = f"auth.public_keys.{index}.file: {entry.file}"
    pem = _read(where, entry.file)
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
    text = _read(where, settings.jwks_file)
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


def tls_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """A server context for TLS 1.2 and later, None without a certificate. Raises ConfigError.

    A certificate is renewed by a new context: loading another into one that serves adds it beside the old one where
    the kinds of their keys differ, and a pair that does not match breaks it.
    """
    if settings.cert_file is None or settings.key_file is None:
        return None
    for name, path in (("cert_file", settings.cert_file), ("key_file", settings.key_file)):
        _read(f"tls.{name}: {path}", path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # WebSocket over TLS is HTTP/1.1 here (RFC 6455); saying so keeps a client from trying HTTP/2.
    context.set_alpn_protocols(["http/1.1"])
    try:
        # The empty password keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(settings.cert_file, settings.key_file, password="")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or "unusable"
        raise ConfigError(
            [f"tls: {settings.cert_file} and {settings.key_file} are no certificate with its key: {reason}"]
        ) from error
    return context


def check_tls(settings: TlsSettings, unseen: Collection[str] = ()) -> None:
    """Check the certificate and its key, or that of both which is not ``unseen``. Raises ConfigError."""
    if "tls.cert_file" not in unseen and "tls.key_file" not in unseen:
        tls_context(settings)
    elif "tls.cert_file" not in unseen and settings.cert_file is not None:
        where = f"tls.cert_file: {settings.cert_file}"
        try:
            load_pem_x509_certificates(_read(where, settings.cert_file))
        except ValueError as error:
            raise ConfigError([f"{where}: not a PEM certificate"]) from error
    elif "tls.key_file" not in unseen and settings.key_file is not None:
        where = f"tls.key_file: {settings.key_file}"
        try:
            load_pem_private_key(_read(where, settings.key_file), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError([f"{where}: not a PEM private key without a password"]) from error
