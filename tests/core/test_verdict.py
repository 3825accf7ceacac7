"""The rule of what becomes of a message, by its header alone."""

from __future__ import annotations

import pytest

from gateway.core import catalogue
from gateway.core.principal import Principal
from gateway.core.routes import Routes
from gateway.core.verdict import NOT_AN_ENVELOPE, judge
from gateway.v1.envelope_pb2 import MessageEnvelope

ALICE = Principal("alice", "acme", "pro", 0.0)
ROUTES = Routes({"tick_data": "tick-data"}, "failed-messages")


def verdict_on(**fields: object) -> object:
    return judge(MessageEnvelope(**fields), ALICE, ROUTES)  # type: ignore[arg-type]  # whatever a client writes


def test_whole_identity_goes_to_its_topic_as_it_came() -> None:
    verdict = judge(MessageEnvelope(message_type="tick_data", user_id="alice", company_id="acme"), ALICE, ROUTES)
    assert verdict.plain
    assert (verdict.topic, verdict.message_type, verdict.reason) == ("tick-data", "tick_data", None)


@pytest.mark.parametrize(("user_id", "company_id"), [("", "acme"), ("alice", ""), ("", "")])
def test_empty_identity_is_stamped_with_the_principals(user_id: str, company_id: str) -> None:
    envelope = MessageEnvelope(message_type="tick_data", user_id=user_id, company_id=company_id, payload=b"x")
    verdict = judge(envelope, ALICE, ROUTES)
    assert not verdict.plain
    stamped = MessageEnvelope.FromString(envelope.SerializeToString() + verdict.stamp)
    assert (stamped.user_id, stamped.company_id, stamped.payload) == ("alice", "acme", b"x")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"message_type": "tick_data", "user_id": "bob"}, catalogue.REASON_FOREIGN_USER),
        ({"message_type": "tick_data", "company_id": "rival"}, catalogue.REASON_FOREIGN_COMPANY),
        ({"message_type": "unheard_of"}, catalogue.REASON_UNKNOWN_TYPE),
        ({"message_type": ""}, catalogue.REASON_UNKNOWN_TYPE),
        ({"message_type": "unheard_of", "user_id": "bob"}, catalogue.REASON_FOREIGN_USER),
        ({"message_type": "failed-messages"}, catalogue.REASON_UNKNOWN_TYPE),
    ],
)
def test_what_is_wrong_is_a_dead_letter_identity_first(fields: dict[str, str], reason: catalogue.Reason) -> None:
    verdict = judge(MessageEnvelope(**fields), ALICE, ROUTES)  # type: ignore[arg-type]  # strings all
    assert (verdict.reason, verdict.plain) == (reason, False)


def test_traced_message_gets_an_id_of_its_own_unless_it_has_one() -> None:
    whole = {"message_type": "tick_data", "user_id": "alice", "company_id": "acme", "enable_tracing": True}
    without = judge(MessageEnvelope(**whole), ALICE, ROUTES)  # type: ignore[arg-type]  # as above
    assert (without.traced, without.plain) == (True, False)
    own = judge(MessageEnvelope(correlation_id="mine", **whole), ALICE, ROUTES)  # type: ignore[arg-type]  # as above
    assert own.plain


def test_what_does_not_parse_is_a_dead_letter() -> None:
    assert NOT_AN_ENVELOPE.reason is catalogue.REASON_NOT_AN_ENVELOPE
    assert not NOT_AN_ENVELOPE.plain
