"""The JWT of a handshake, verified once: which keys and claims are believed, and the `Principal` they yield.

The algorithms are the configured list, never the token's choice: a key is bound to its algorithms when it is
loaded, a token's ``alg`` only selects among them (RFC 8725 3.1). Nothing in the header is fetched: ``jku``,
``x5u`` and ``jwk`` are ignored, ``kid`` is compared with the names of the keys at hand, ``crit`` is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import jwt
from google.protobuf.message import DecodeError

from gateway.core.principal import Principal
from gateway.errors import GatewayError, InvalidToken
from gateway.v1.token_pb2 import SubscriptionTier, UserToken

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_TOKEN_BYTES: Final = 8192
"""Checked before anything is decoded; a JWT of this system is under 1 KiB."""
MAX_ID_BYTES: Final = 256
"""Bound of a user_id and a company_id; they become record keys, headers and log fields."""

MAX_DATE: Final = 2.0**53
"""Bound of a NumericDate: what a double still counts exactly, and every encoding of a control message holds."""

ALGORITHMS: Final = ("HS256", "RS256", "ES256", "EdDSA")

# hot: PyJWT's verifiers without its decoding, which walks the token's characters in Python: 33 µs a handshake instead
# of 116 (bench/micro.py). What is decoded around them is checked here, more strictly.
_VERIFIERS: Final = {name: jwt.get_algorithm_by_name(name) for name in ALGORITHMS}

_SEGMENT = re.compile(r"[A-Za-z0-9_-]+\Z")
_TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
TIERS: Final = {
    SubscriptionTier.TIER_FREE: "free",
    SubscriptionTier.TIER_PRO: "pro",
    SubscriptionTier.TIER_ENTERPRISE: "enterprise",
}


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """One verification key, bound to one algorithm. ``key`` is what PyJWT's ``prepare_key`` gives; never printed."""

    algorithm: str
    key: Any
    kid: str | None = None

    def __repr__(self) -> str:
        return f"VerifyKey({self.algorithm}, kid={self.kid!r})"


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must satisfy: ``audience`` None leaves ``aud`` unchecked, ``leeway_s`` is for clock skew.

    Tokens issued before ``not_before`` (seconds since the epoch) and those whose ``jti`` is in ``revoked`` have ended
    early.
    """

    keys: tuple[VerifyKey, ...]
    issuer: str
    audience: str | None = None
    leeway_s: float = 5.0
    not_before: float = 0.0
    revoked: frozenset[str] = frozenset()

    def is_revoked(self, principal: Principal) -> bool:
        """Whether a token that was good has been ended before its time."""
        return principal.issued_at < self.not_before or principal.token_id in self.revoked

    def authenticate(self, token: str, now: float) -> Principal:
        """Verify ``token`` at ``now`` (seconds since the epoch); raises InvalidToken."""
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidToken("too_long")
        if not _TOKEN.match(token):
            raise InvalidToken("not_a_jwt")
        claims = self._verify(token, _read_object(token.partition(".")[0], "bad_header", "repeated_header"))
        expires_at = self._check_claims(claims, now)
        principal = _principal(claims, expires_at, now - self.leeway_s)
        if self.is_revoked(principal):
            raise InvalidToken("revoked")
        return principal

    def _verify(self, token: str, header: dict[str, Any]) -> dict[str, Any]:
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str):
            raise InvalidToken("bad_algorithm")
        if "crit" in header:
            raise InvalidToken("unknown_crit")  # RFC 7515 4.1.11: none is understood here
        if "b64" in header:
            raise InvalidToken("unencoded_payload")  # RFC 7797 3 and 6: needs crit, and no JWT has it
        if "kid" in header and (not isinstance(kid, str) or _CONTROL.search(kid)):
            raise InvalidToken("bad_kid")
        candidates = [key for key in self.keys if key.algorithm == algorithm and _may_be(key.kid, kid)]
        if not candidates:
            raise InvalidToken("no_key")
        signed, _, signature = token.rpartition(".")
        verify = _VERIFIERS[algorithm].verify
        try:
            if not any(verify(signed.encode(), key.key, _base64url(signature)) for key in candidates):
                raise InvalidToken("bad_signature")
        except ValueError:
            raise InvalidToken("malformed") from None
        return _read_object(signed.partition(".")[2], "malformed", "repeated_claim")

    def _check_claims(self, claims: dict[str, Any], now: float) -> float:
        """Check issuer, audience and times (RFC 7519 4.1); return ``exp``."""
        if claims.get("iss") != self.issuer:
            raise InvalidToken("wrong_issuer")
        if self.audience is not None:
            audience = claims.get("aud")
            listed = audience if isinstance(audience, list) else [audience]
            if self.audience not in listed:
                raise InvalidToken("wrong_audience")
        expires_at = _numeric_date(claims, "exp")
        if expires_at is None:
            raise InvalidToken("no_exp")
        if expires_at + self.leeway_s <= now:
            raise InvalidToken("expired")
        if "iat" not in claims:
            raise InvalidToken("no_iat")
        for name in ("nbf", "iat"):
            value = _numeric_date(claims, name)
            if value is not None and value - self.leeway_s > now:
                raise InvalidToken(f"{name}_in_future")
        return expires_at


def _numeric_date(claims: dict[str, Any], name: str) -> float | None:
    """A NumericDate (RFC 7519 2) as a float; a string, a bool or an infinity is refused."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidToken(f"bad_{name}")
    try:
        number = float(value)
    except OverflowError:
        raise InvalidToken(f"bad_{name}") from None
    if not math.isfinite(number) or abs(number) > MAX_DATE:
        raise InvalidToken(f"bad_{name}")
    return number


def _may_be(key_kid: str | None, kid: str | None) -> bool:
    """Whether a key may have signed a token: one without a name any token, one with a name those that do not name
    another (RFC 7515 4.1.4: ``kid`` is a hint)."""
    return key_kid is None or kid is None or key_kid == kid


class _Repeated(GatewayError):
    """A JSON object with the same name twice, which parsers disagree about (RFC 7519 4, RFC 8259 4)."""


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Repeated
    return found


def _no_constant(name: str) -> None:
    """NaN and infinities, which Python reads, are not JSON (RFC 8259 6)."""
    raise ValueError(name)


def _read_object(segment: str, malformed: str, repeated: str) -> dict[str, Any]:
    """The JSON object in a token's segment: UTF-8 and nothing else (RFC 7519 7.1). Raises InvalidToken."""
    try:
        found = json.loads(_base64url(segment).decode(), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except _Repeated:
        raise InvalidToken(repeated) from None
    except (ValueError, RecursionError):
        raise InvalidToken(malformed) from None
    if not isinstance(found, dict):
        raise InvalidToken(malformed)
    return found


def _base64url(text: str) -> bytes:
    """Decode base64url, padding optional (RFC 4648 5); raises ValueError."""
    stripped = text.rstrip("=")
    if len(text) - len(stripped) > 2 or not _SEGMENT.match(stripped):
        raise ValueError("not base64url")
    try:
        return base64.urlsafe_b64decode(stripped + "=" * (-len(stripped) % 4))
    except binascii.Error as error:
        raise ValueError("not base64url") from error


def _identifier(value: object, name: str, *, empty: bool) -> str:
    if not isinstance(value, str) or (not value and not empty):
        raise InvalidToken(f"bad_{name}")
    if _CONTROL.search(value) or len(value.encode(errors="replace")) > MAX_ID_BYTES:
        raise InvalidToken(f"bad_{name}")
    return value


def _principal(claims: dict[str, Any], expires_at: float, now: float) -> Principal:
    user_id = _identifier(claims.get("sub"), "sub", empty=False)
    data = claims.get("data")
    if not isinstance(data, str):
        raise InvalidToken("no_data")
    try:
        token = UserToken.FromString(_base64url(data))
    except (ValueError, DecodeError):
        raise InvalidToken("bad_data") from None
    if token.user_id != user_id:
        raise InvalidToken("data_disagrees")
    company_id = _identifier(token.company_id, "company_id", empty=True)
    tier = TIERS.get(token.subscription_tier)
    if tier is None:
        raise InvalidToken("unknown_tier")
    if token.expires_at:
        if token.expires_at > expires_at:
            raise InvalidToken("data_disagrees")
        expires_at = float(token.expires_at)
        if expires_at <= now:
            raise InvalidToken("expired")
    issued_at = _numeric_date(claims, "iat") or 0.0
    # the users of a company share one string of it
    return Principal(user_id, sys.intern(company_id), tier, expires_at, issued_at, _token_id(claims))


def _token_id(claims: dict[str, Any]) -> str | None:
    """The token's ``jti``, None without one; a number, against RFC 7519 4.1.7, is taken for its digits."""
    value = claims.get("jti")
    if value is None:
        return None
    return _identifier(str(value) if type(value) is int else value, "jti", empty=True)


def mint(
    *,
    algorithm: str,
    key: Any,
    user_id: str,
    company_id: str,
    tier: str = "free",
    issuer: str,
    audience: str | None = None,
    kid: str | None = None,
    issued_at: int,
    expires_at: int,
    token_id: str | None = None,
) -> str:
    """Make a token that `TokenRules.authenticate` accepts; times in seconds since the epoch.

    For development and tests: in production the API gateway issues them. An unknown tier
    raises KeyError.
    """
    numbers = {name: number for number, name in TIERS.items()}
    data = UserToken(
        user_id=user_id,
        company_id=company_id,
        subscription_tier=numbers[tier],
        issued_at=issued_at,
        expires_at=expires_at,
    ).SerializeToString()
    claims: dict[str, Any] = {
        "sub": user_id,
        "iss": issuer,
        "iat": issued_at,
        "exp": expires_at,
        "data": base64.urlsafe_b64encode(data).rstrip(b"=").decode(),
    }
    if audience is not None:
        claims["aud"] = audience
    if token_id is not None:
        claims["jti"] = token_id
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid} if kid else None)
