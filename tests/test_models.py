"""The shapes that cross the boundary."""

import json
from datetime import UTC, datetime
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from backend.models.access.credentials import Secret, TokenRequest
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.models.wireguard.provisioning import (
    METADATA_MAX_BYTES,
    METADATA_MAX_DEPTH,
    NodeCapabilities,
    PeerConfiguration,
    ProvisioningRecord,
    ProvisioningRequest,
    ProvisioningResponse,
)
from tests.harness.requests import provision_body

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=12,
)


def depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(depth, children), default=0)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_metadata_is_taken_as_it_is_or_refused_by_its_bounds(metadata: dict[str, Any]) -> None:
    body = provision_body("node-1", metadata=metadata)
    size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode())
    fits = size <= METADATA_MAX_BYTES and depth(metadata) <= METADATA_MAX_DEPTH
    try:
        request = ProvisioningRequest.model_validate(body)
    except ValidationError:
        assert not fits
    else:
        assert fits
        assert request.metadata == metadata


def test_metadata_deeper_than_the_stack_is_refused_and_not_recursed_into() -> None:
    metadata: dict[str, Any] = {}
    for _ in range(100_000):
        metadata = {"a": metadata}
    with pytest.raises(ValidationError, match="8 levels") as refused:
        ProvisioningRequest.model_validate(provision_body("node-1", metadata=metadata))
    assert refused.value.error_count() == 1
    while metadata:  # or its own end would recurse
        metadata = metadata["a"]


@given(st.text())
def test_only_names_of_the_allowed_letters_are_names(text: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
    try:
        ProvisioningRequest.model_validate(provision_body(text))
    except ValidationError:
        assert not (1 <= len(text) <= 128 and set(text) <= allowed)
    else:
        assert 1 <= len(text) <= 128
        assert set(text) <= allowed


@pytest.mark.parametrize(
    ("version", "right"),
    [
        ("0.0.0", True),
        ("1.0.0-alpha.1", True),
        ("1.0.0-0A.is.legal", True),
        ("1.0.0+0.build.1-rc.10000aaa-kk-0.1", True),
        ("1.0.0-rc.1+build.1", True),
        ("1.2", False),
        ("1.2.3.4", False),
        ("1.02.3", False),
        ("1.0.0-01", False),
        ("1.0.0-", False),
        ("1.0.0+", False),
        ("1.0.0-a..b", False),
        (" 1.0.0", False),
        ("1.0.0\n", False),
    ],
)
def test_a_version_is_a_semantic_one(version: str, right: bool) -> None:
    body = provision_body("node-1", version=version)
    if right:
        assert ProvisioningRequest.model_validate(body).version == version
    else:
        with pytest.raises(ValidationError, match="semantic version"):
            ProvisioningRequest.model_validate(body)


def test_capabilities_have_the_defaults_that_callers_rely_on() -> None:
    assert NodeCapabilities().model_dump() == {
        "gpu_count": 0,
        "gpu_memory_mb": 0,
        "cpu_cores": 1,
        "memory_mb": 1024,
        "models": [],
    }


@pytest.mark.parametrize("form", ["{}", "node-{}", "{}-{}"])
def test_a_credential_in_place_of_a_name_is_refused_and_not_repeated(form: str) -> None:
    secret = Secret.generate().reveal()
    text = form.format(secret, "x")
    with pytest.raises(ValidationError, match="this is a credential") as refused:
        ProvisioningRequest.model_validate(provision_body(text))
    assert secret not in str(refused.value.errors(include_input=False, include_context=False))
    with pytest.raises(ValidationError, match="this is a credential"):
        TokenRequest(node_id_pattern=text)
    # A credential's ID alone is no secret.
    assert ProvisioningRequest.model_validate(provision_body(secret[:20])).node_id == secret[:20]


@pytest.mark.parametrize("value", [True, "1", 1.5, None])
def test_a_number_is_not_made_of_anything_else(value: object) -> None:
    with pytest.raises(ValidationError):
        NodeCapabilities.model_validate({"gpu_count": value})


def test_an_answer_tells_its_time_in_utc_with_a_z() -> None:
    config = PeerConfiguration(
        node_id="node-1",
        assigned_ip=IPv4Address("10.0.0.2"),
        subnet_mask=IPv4Address("255.255.255.0"),
        hub_public_key=WireGuardPrivateKey.generate().public_key(),
        hub_endpoint="hub.example.com:51820",
        allowed_ips="10.0.0.0/24",
        persistent_keepalive=25,
        dns_servers=[IPv4Address("10.0.0.1")],
        provisioned_at=datetime(2026, 2, 19, 12, tzinfo=UTC),
    )
    answer = json.loads(ProvisioningResponse(config=config, message="done").model_dump_json())
    assert answer["status"] == "success"
    assert answer["config"]["provisioned_at"] == "2026-02-19T12:00:00Z"
    assert answer["config"]["assigned_ip"] == "10.0.0.2"


def test_a_time_without_a_zone_is_refused_and_any_other_becomes_utc() -> None:
    body = {
        "node_id": "node-1",
        "public_key": "libp2p",
        "wireguard_public_key": WireGuardPrivateKey.generate().public_key(),
        "assigned_ip": "10.0.0.2",
        "capabilities": {},
        "version": "1.0.0",
    }
    record = ProvisioningRecord.model_validate({**body, "provisioned_at": "2026-02-19T14:00:00.7+02:00"})
    assert record.model_dump(mode="json")["provisioned_at"] == "2026-02-19T12:00:00Z"
    with pytest.raises(ValidationError, match="timezone"):
        ProvisioningRecord.model_validate({**body, "provisioned_at": "2026-02-19T14:00:00"})


def test_every_model_refuses_unknown_fields() -> None:
    for model in (
        NodeCapabilities,
        PeerConfiguration,
        ProvisioningRecord,
        ProvisioningRequest,
        ProvisioningResponse,
    ):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            model.model_validate({"colour": "red"})


@given(
    st.dictionaries(st.text(max_size=8), json_values, max_size=3),
    st.datetimes(timezones=st.just(UTC)),
    st.integers(0, 2**32 - 1),
)
def test_a_record_comes_back_as_it_was(metadata: dict[str, Any], moment: datetime, address: int) -> None:
    record = ProvisioningRecord(
        node_id="node-1",
        public_key="libp2p",
        wireguard_public_key=WireGuardKey.parse("vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="),
        assigned_ip=IPv4Address(address),
        provisioned_at=moment,
        capabilities=NodeCapabilities(),
        version="1.0.0",
        metadata=metadata,
    )
    assert ProvisioningRecord.model_validate_json(record.model_dump_json()) == record
