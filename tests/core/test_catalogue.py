"""The catalogue is the one list: what is derived from it, and that README.md says the same."""

from __future__ import annotations

import importlib
import pkgutil
from http import HTTPStatus
from pathlib import Path

import pytest

import gateway
from gateway.core import catalogue
from gateway.core.catalogue import Advice, Close, Reason, Refusal
from gateway.errors import GatewayError

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(catalogue.tables()))
def test_readme_has_the_table_as_the_catalogue_gives_it(name: str) -> None:
    table = catalogue.tables()[name]
    assert f"<!-- table: {name} -->\n{table}\n" in README, f"README.md wants this table:\n{table}"


def test_a_name_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Refusal, Close, Reason):
        monkeypatch.setattr(kind, "registered", dict(kind.registered))
    Refusal("brand_new", HTTPStatus.CONFLICT, "Something new.", Advice.NEVER)
    assert catalogue.refusal_advice(409, "brand_new") is Advice.NEVER
    assert "brand_new" in catalogue.refusal_codes()
    with pytest.raises(ValueError, match="brand_new"):
        Refusal("brand_new", HTTPStatus.CONFLICT, "Again.", Advice.NEVER)
    with pytest.raises(ValueError, match="idle"):
        Close("idle", 4999, "again", Advice.LATER)
    with pytest.raises(ValueError, match="kafka_refused"):
        Reason("kafka_refused", "again")


def test_one_code_has_one_advice() -> None:
    """A client that knows the code only must not be told two things."""
    for status in {one.status for one in Refusal.registered.values()}:
        advice = {one.advice for one in Refusal.registered.values() if one.status == status}
        assert len({one is Advice.LATER for one in advice}) == 1, status
    for code in {one.code for one in Close.registered.values()}:
        assert len({one.advice for one in Close.registered.values() if one.code == code}) == 1, code


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "invalid_token", Advice.NEW_TOKEN),
        (401, "somebody_elses", Advice.NEW_TOKEN),
        (503, "draining", Advice.LATER),
        (503, "", Advice.LATER),
        (502, "", Advice.LATER),
        (404, "<html>", Advice.AFTER_FIX),
        (503, "not_found", Advice.LATER),
    ],
)
def test_what_a_client_does_with_an_answer_whoever_gave_it(status: int, code: str, advice: Advice) -> None:
    assert catalogue.refusal_advice(status, code) is advice


@pytest.mark.parametrize(
    ("code", "reconnects"), [(1002, False), (1012, True), (1006, True), (1015, False), (4401, True), (4403, False)]
)
def test_what_a_client_does_with_a_close_code(code: int, reconnects: bool) -> None:
    assert catalogue.close_advice(code).reconnects is reconnects


def test_every_exception_is_in_the_one_tree() -> None:
    for module in pkgutil.walk_packages(gateway.__path__, "gateway."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = {kind for kind in subclasses(BaseException) if kind.__module__.startswith("gateway.")}
    assert not {kind for kind in ours if not issubclass(kind, GatewayError)}


def subclasses(kind: type[BaseException]) -> set[type[BaseException]]:
    """All classes below ``kind``."""
    return {one for direct in kind.__subclasses__() for one in {direct, *subclasses(direct)}}
