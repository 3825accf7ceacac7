"""Tokens without a socket: any change to a good token, and any claim, is refused or harmless."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.credentials import TokenRules, VerifyKey, mint
from gateway.errors import InvalidToken
from tests.tokens import b64, data_claim, sign

SECRET = b"s" * 48
RULES = TokenRules((VerifyKey("HS256", SECRET),), "api-gateway")
NOW = 1_800_000_000
GOOD = {"sub": "alice", "iss": "api-gateway", "iat": NOW, "exp": NOW + 60, "data": data_claim()}


def test_a_minted_token_yields_its_principal() -> None:
    token = mint(
        algorithm="HS256", key=SECRET, user_id="alice", company_id="acme", tier="enterprise", issuer="api-gateway",
        issued_at=NOW, expires_at=NOW + 60,
    )  # fmt: skip
    principal = RULES.authenticate(token, NOW)
    assert (principal.user_id, principal.company_id, principal.tier) == ("alice", "acme", "enterprise")
    assert principal.expires_at == NOW + 60


@pytest.mark.parametrize(
    ("now", "admitted"), [(NOW - 6, False), (NOW - 5, True), (NOW + 64.9, True), (NOW + 65, False)]
)
def test_leeway_is_five_seconds_on_both_sides(now: float, admitted: bool) -> None:
    if admitted:
        RULES.authenticate(sign(SECRET, GOOD), now)
    else:
        with pytest.raises(InvalidToken):
            RULES.authenticate(sign(SECRET, GOOD), now)


def test_the_earlier_of_exp_and_expires_at_counts() -> None:
    token = sign(SECRET, {**GOOD, "data": data_claim(expires_at=NOW + 30)})
    assert RULES.authenticate(token, NOW).expires_at == NOW + 30


@given(st.integers(0, 400), st.characters(codec="ascii", categories=["L", "N"]))
def test_no_changed_character_passes_as_another_principal(position: int, character: str) -> None:
    token = sign(SECRET, GOOD)
    position %= len(token)
    changed = token[:position] + character + token[position + 1 :]
    with suppress(InvalidToken):
        assert RULES.authenticate(changed, NOW).user_id == "alice"


@given(st.text(max_size=200))
def test_any_text_is_refused_without_another_exception(text: str) -> None:
    with pytest.raises(InvalidToken):
        RULES.authenticate(text, NOW)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["sub", "iss", "exp", "nbf", "iat", "data"]), json_values)
def test_signed_claims_of_any_type_are_accepted_or_refused_and_nothing_else(name: str, value: object) -> None:
    token = sign(SECRET, json.dumps({**GOOD, name: value}).encode("utf-8", "surrogatepass"))
    with suppress(InvalidToken):
        RULES.authenticate(token, NOW)


@given(st.dictionaries(st.sampled_from(["alg", "kid", "crit", "typ", "b64", "jwk"]), json_values))
def test_headers_of_any_type_are_accepted_or_refused_and_nothing_else(header: dict[str, object]) -> None:
    try:
        RULES.authenticate(sign(SECRET, GOOD, header), NOW)
    except InvalidToken:
        return
    assert header.get("alg") == "HS256"


def test_kid_selects_among_the_keys_that_have_one() -> None:
    rules = TokenRules((VerifyKey("HS256", SECRET, "a"), VerifyKey("HS256", b"t" * 48, "b")), "api-gateway")
    rules.authenticate(sign(b"t" * 48, GOOD, {"alg": "HS256", "kid": "b"}), NOW)
    rules.authenticate(sign(b"t" * 48, GOOD), NOW)
    with pytest.raises(InvalidToken, match="bad_signature"):
        rules.authenticate(sign(b"t" * 48, GOOD, {"alg": "HS256", "kid": "a"}), NOW)
    with pytest.raises(InvalidToken, match="no_key"):
        rules.authenticate(sign(b"t" * 48, GOOD, {"alg": "HS256", "kid": "c"}), NOW)


def test_nothing_that_is_printed_holds_a_key() -> None:
    assert SECRET.decode() not in repr(RULES)
    assert b64(SECRET) not in repr(RULES)
