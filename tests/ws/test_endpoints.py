"""From a path to what is served there."""

from __future__ import annotations

import pytest

from gateway.core import catalogue
from gateway.core.origins import OriginRules
from gateway.errors import Refused
from gateway.ws.endpoints import Endpoint, Endpoints, Granted, PathTemplate
from tests.echo import LIMITS, open_echo


@pytest.mark.parametrize(
    ("template", "path", "parameters"),
    [
        ("/ws/mt5", "/ws/mt5", {}),
        ("/ws/mt5", "/ws/mt5/", {}),
        ("/ws/mt5/", "/ws/mt5", {}),
        ("/", "/", {}),
        ("/ws/simulation/{id}", "/ws/simulation/7", {"id": "7"}),
        ("/ws/{a}/x/{b}", "/ws/1/x/2/", {"a": "1", "b": "2"}),
        ("/ws/a.b", "/ws/a.b", {}),
    ],
)
def test_path_of_a_templates_form_matches(template: str, path: str, parameters: dict[str, str]) -> None:
    assert PathTemplate(template).match(path) == parameters


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("/ws/mt5", "/ws/mt6"),
        ("/ws/mt5", "/ws/mt5/x"),
        ("/ws/mt5", "/ws"),
        ("/ws/a.b", "/ws/axb"),
        ("/ws/simulation/{id}", "/ws/simulation"),
        ("/ws/simulation/{id}", "/ws/simulation/"),
        ("/ws/simulation/{id}", "/ws/simulation/1/2"),
        ("/ws/mt5", "/WS/mt5"),
    ],
)
def test_other_paths_do_not(template: str, path: str) -> None:
    assert PathTemplate(template).match(path) is None


@pytest.mark.parametrize("template", ["/ws/{id}/{id}", "/ws/x{id}", "/ws/{}", "/ws/{id"])
def test_template_that_makes_no_sense_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="/ws/"):
        PathTemplate(template)


def endpoint(name: str, template: str) -> Endpoint:
    return Endpoint(name, PathTemplate(template), LIMITS, OriginRules(), lambda _: Granted(None), open_echo)


def test_first_endpoint_of_a_path_serves_it_and_other_paths_are_not_found() -> None:
    endpoints = Endpoints([endpoint("all", "/ws/simulation/all"), endpoint("one", "/ws/simulation/{id}")])
    assert endpoints.find("/ws/simulation/all")[0].name == "all"
    found, parameters = endpoints.find("/ws/simulation/7")
    assert (found.name, parameters) == ("one", {"id": "7"})
    with pytest.raises(Refused) as refused:
        endpoints.find("/ws/nothing")
    assert refused.value.refusal is catalogue.NOT_FOUND
