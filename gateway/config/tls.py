"""The certificate and its key, read and checked: what fails names the setting and the file."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from gateway.config.files import read_file
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

    from gateway.config.settings import TlsSettings


def tls_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """A server context for TLS 1.2 and later, None without a certificate. Raises ConfigError.

    A certificate is renewed by a new context: loading another into one that serves adds it beside the old one where
    the kinds of their keys differ, and a pair that does not match breaks it.
    """
    if settings.cert_file is None or settings.key_file is None:
        return None
    for name, path in (("cert_file", settings.cert_file), ("key_file", settings.key_file)):
        read_file(f"tls.{name}: {path}", path)
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
            load_pem_x509_certificates(read_file(where, settings.cert_file))
        except ValueError as error:
            raise ConfigError([f"{where}: not a PEM certificate"]) from error
    elif "tls.key_file" not in unseen and settings.key_file is not None:
        where = f"tls.key_file: {settings.key_file}"
        try:
            load_pem_private_key(read_file(where, settings.key_file), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError([f"{where}: not a PEM private key without a password"]) from error
