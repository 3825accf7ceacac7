"""Stamping by appending: the received bytes stay, the fields are right, whatever the envelope holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import refusals
from gateway.core.envelope import foreign, identity_stamp, parse, tracing_stamp
from gateway.core.principal import Principal
from gateway.errors import NotAnEnvelope
from gateway.v1.envelope_pb2 import MessageEnvelope

ALICE = Principal("alice", "acme", "pro", 0.0)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
envelopes = st.builds(
    MessageEnvelope,
    message_type=names,
    user_id=names,
    company_id=names,
    payload=st.binary(max_size=200),
    timestamp=st.integers(-(2**63), 2**63 - 1),
    correlation_id=names,
    enable_tracing=st.booleans(),
)


@given(envelopes, names.filter(bool), names)
def test_stamped_bytes_parse_as_the_same_envelope_with_the_principals_identity(
    envelope: MessageEnvelope, user_id: str, company_id: str
) -> None:
    raw = envelope.SerializeToString()
    stamp = identity_stamp(envelope, Principal(user_id, company_id, "free", 0.0))
    stamped = MessageEnvelope.FromString(raw + stamp)
    assert stamped.user_id == (envelope.user_id or user_id)
    assert stamped.company_id == (envelope.company_id or company_id)
    for name in ("message_type", "payload", "timestamp", "correlation_id", "enable_tracing"):
        assert getattr(stamped, name) == getattr(envelope, name)


@given(envelopes, names)
def test_traced_bytes_carry_the_correlation_id(envelope: MessageEnvelope, correlation_id: str) -> None:
    raw = envelope.SerializeToString()
    assert MessageEnvelope.FromString(raw + tracing_stamp(correlation_id)).correlation_id == correlation_id


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_no_envelope(raw: bytes) -> None:
    try:
        parse(raw)
    except NotAnEnvelope:
        return
    assert raw


@pytest.mark.parametrize(
    ("user_id", "company_id", "reason"),
    [
        ("alice", "acme", None),
        ("", "", None),
        ("bob", "acme", refusals.REASON_FOREIGN_USER),
        ("alice", "rival", refusals.REASON_FOREIGN_COMPANY),
        ("bob", "rival", refusals.REASON_FOREIGN_USER),
    ],
)
def test_only_the_principals_identity_or_none_passes(user_id: str, company_id: str, reason: str | None) -> None:
    assert foreign(MessageEnvelope(user_id=user_id, company_id=company_id), ALICE) == reason


def test_an_empty_message_is_no_envelope() -> None:
    with pytest.raises(NotAnEnvelope):
        parse(b"")
