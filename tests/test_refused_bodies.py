"""What it costs to refuse a body, and how much comes back for it."""

import asyncio
import json
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Query
from pydantic import BaseModel, ValidationError

from backend.api.errors import MAX_BODY_BYTES, MAX_ERRORS
from backend.api.routes import DomainErrorRoute
from backend.api.v1.endpoints.wireguard_provisioning import ChallengeRequest
from backend.models.access.audit import AuditQuery
from backend.models.access.credentials import KeyRequest, TokenRequest
from backend.models.wireguard.provisioning import MODELS_MAX, NodeCapabilities, ProvisioningRequest
from tests.harness.requests import new_key, provision_body

VALID: dict[type[BaseModel], dict[str, Any]] = {
    ProvisioningRequest: provision_body("node-1"),
    NodeCapabilities: {},
    ChallengeRequest: {"wireguard_public_key": new_key()},
    TokenRequest: {},
    KeyRequest: {"role": "read"},
}
NUMBERS = [1] * (MAX_BODY_BYTES // 3)
STRANGERS = {f"{number:x}": 1 for number in range(7000)}
HOSTILE: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "wrong models": (ProvisioningRequest, {"capabilities": {"models": NUMBERS}}),
    "wrong models in capabilities": (NodeCapabilities, {"models": NUMBERS}),
    "models past their number": (ProvisioningRequest, {"capabilities": {"models": ["m"] * 9000}}),
    "unknown fields in capabilities": (ProvisioningRequest, {"capabilities": STRANGERS}),
    "wide metadata": (ProvisioningRequest, {"metadata": STRANGERS}),
    **{f"unknown fields of {model.__name__}": (model, STRANGERS) for model in VALID},
}


def answer_to(model: type[BaseModel], body: dict[str, Any]) -> httpx.Response:
    router = APIRouter(route_class=DomainErrorRoute)

    async def take(body: Any) -> None:
        raise AssertionError(body)

    take.__annotations__["body"] = model
    router.post("/")(take)
    return ask(router, "POST", content=json.dumps(body, separators=(",", ":")))


def ask(router: APIRouter, method: str, **request: Any) -> httpx.Response:
    app = FastAPI()
    app.include_router(router)

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hub") as client:
            return await client.request(method, "/", headers={"Content-Type": "application/json"}, **request)

    return asyncio.run(main())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_body_full_of_errors_is_refused_with_few_of_them(name: str) -> None:
    model, over = HOSTILE[name]
    body = VALID[model] | over
    assert len(json.dumps(body, separators=(",", ":"))) > MAX_BODY_BYTES * 0.4
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() == 1
    answer = answer_to(model, body)
    assert answer.status_code == 422
    assert len(answer.content) < 1024


def test_validation_of_models_stops_at_the_first_wrong_one() -> None:
    with pytest.raises(ValidationError) as refused:
        NodeCapabilities.model_validate({"models": [1] * MODELS_MAX})
    assert refused.value.error_count() == 1


def test_one_answer_lists_no_more_than_its_share_of_errors() -> None:
    strangers = {f"stranger-{number}": 1 for number in range(MAX_ERRORS)}
    answer = answer_to(ProvisioningRequest, strangers)
    errors = answer.json()["detail"]
    assert len(errors) == MAX_ERRORS
    assert errors[0]["loc"] == ["body", "node_id"]


def test_the_name_of_an_unknown_field_does_not_come_back_whole() -> None:
    answer = answer_to(TokenRequest, {"x" * 60_000: 1})
    assert answer.status_code == 422
    assert len(answer.content) < 1024


def test_a_query_full_of_unknown_fields_is_refused_with_few_errors() -> None:
    router = APIRouter(route_class=DomainErrorRoute)

    @router.get("/")
    async def take(parameters: Annotated[AuditQuery, Query()]) -> None:
        raise AssertionError(parameters)

    answer = ask(router, "GET", params={f"{number:x}": 1 for number in range(2000)})
    assert answer.status_code == 422
    assert len(answer.content) < 1024
    assert ask(router, "GET", params={"limit": "one"}).json()["detail"][0]["loc"] == ["query", "limit"]


def test_a_whole_number_with_a_point_is_taken_for_one_and_no_other() -> None:
    router = APIRouter(route_class=DomainErrorRoute)

    @router.post("/")
    async def take(body: TokenRequest) -> int:
        return body.expires_in

    assert ask(router, "POST", content='{"expires_in": 3600.0}').json() == 3600
    for text in ("3600.5", '"3600"', "true", "1e-1"):
        assert ask(router, "POST", content=f'{{"expires_in": {text}}}').status_code == 422


@pytest.mark.parametrize(
    ("models", "right"),
    [
        pytest.param(["m" * 256] * MODELS_MAX, True, id="as many and as long as may be"),
        pytest.param(["llama 2 7b"], True, id="spaces inside"),
        pytest.param(["m"] * (MODELS_MAX + 1), False, id="one too many"),
        pytest.param(["m" * 257], False, id="one too long"),
        pytest.param([""], False, id="empty"),
        pytest.param([" "], False, id="blank"),
        pytest.param(["m", "  "], False, id="blank behind one that is right"),
        pytest.param(["m\n"], False, id="not printable"),
    ],
)
def test_models_are_a_bounded_list_of_names(models: list[str], right: bool) -> None:
    if right:
        assert NodeCapabilities(models=models).models == models
    else:
        with pytest.raises(ValidationError):
            NodeCapabilities(models=models)
