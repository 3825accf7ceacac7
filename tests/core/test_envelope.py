"""Stamping by appending: the received bytes stay, the fields are right, whatever the envelope holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import catalogue
from gateway.core.envelope import head, identity_stamp, parse, repeats, tracing_stamp
from gateway.core.principal import Principal
from gateway.core.verdict import foreign
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
        ("bob", "acme", catalogue.REASON_FOREIGN_USER),
        ("alice", "rival", catalogue.REASON_FOREIGN_COMPANY),
        ("bob", "rival", catalogue.REASON_FOREIGN_USER),
    ],
)
def test_only_the_principals_identity_or_none_passes(user_id: str, company_id: str, reason: str | None) -> None:
    assert foreign(MessageEnvelope(user_id=user_id, company_id=company_id), ALICE) == reason


def test_an_empty_message_is_no_envelope() -> None:
    with pytest.raises(NotAnEnvelope):
        parse(b"")


plain = st.builds(
    MessageEnvelope,
    message_type=names,
    user_id=names,
    company_id=names,
    payload=st.binary(min_size=1, max_size=300),
    timestamp=st.integers(0, 2**63 - 1),
)
field_values = st.builds(MessageEnvelope.SerializeToString, envelopes)


def varint(number: int) -> bytes:
    return bytes((number & 0x7F | 0x80,)) + varint(number >> 7) if number > 0x7F else bytes((number,))


@given(
    plain,
    st.one_of(
        st.binary(max_size=40),
        st.builds(lambda payload, tail: varint(len(payload)) + payload + tail, st.binary(max_size=200), field_values),
        st.builds(lambda size, data: varint(size) + data, st.integers(0, 70_000), st.binary(max_size=200)),
        st.builds(
            lambda payload, tail: varint(len(payload)) + payload + tail, st.binary(max_size=9), st.binary(max_size=12)
        ),
    ),
)
def test_what_repeats_a_head_parses_and_says_the_same_of_itself(first: MessageEnvelope, rest: bytes) -> None:
    beginning = head(first.SerializeToString())
    raw = beginning + rest
    if not beginning or not repeats(raw, beginning):
        return
    other = parse(raw)
    assert (other.message_type, other.user_id, other.company_id) == (
        first.message_type,
        first.user_id,
        first.company_id,
    )
    assert not other.enable_tracing
    assert not other.correlation_id


@given(
    plain,
    st.binary(min_size=1, max_size=16_383),
    st.integers(0, 2**63 - 1),
)
def test_another_payload_and_timestamp_repeat_the_head(first: MessageEnvelope, payload: bytes, timestamp: int) -> None:
    beginning = head(first.SerializeToString())
    short = max(len(name.encode()) for name in (first.message_type, first.user_id, first.company_id)) < 128
    assert bool(beginning) == short
    if beginning:
        first.payload, first.timestamp = payload, timestamp
        assert repeats(first.SerializeToString(), beginning)


@pytest.mark.parametrize(
    "tail",
    [
        MessageEnvelope(user_id="mallory").SerializeToString(),
        MessageEnvelope(company_id="other").SerializeToString(),
        MessageEnvelope(message_type="other").SerializeToString(),
        MessageEnvelope(enable_tracing=True).SerializeToString(),
        MessageEnvelope(correlation_id="x").SerializeToString(),
        MessageEnvelope(payload=b"x").SerializeToString(),
        b"\x28\x01" + MessageEnvelope(user_id="mallory").SerializeToString(),
        b"\x28\x01\x28\x01",
        b"\x28" + b"\x80" * 10 + b"\x01",
        b"\x28\x80",
        b"\x28",
    ],
)
def test_nothing_may_follow_that_could_override_the_head(tail: bytes) -> None:
    good = MessageEnvelope(message_type="tick_data", user_id="alice", company_id="acme", payload=b"p")
    raw = good.SerializeToString()
    assert head(raw)
    assert not repeats(raw + tail, head(raw))
    assert not head(raw + tail)
