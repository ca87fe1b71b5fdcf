"""The one table from the domain's errors to HTTP: what each of them is answered with."""

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError

from backend import errors
from backend.api.errors import ANSWERS, BodyTooLargeError, answer
from backend.api.strict_json import StrictJSONError

POOL_FULL = errors.IPPoolExhaustedError("10.0.0.0/24", 253)

# Each error with its status and Retry-After, in seconds. A full pool seldom gets room at once. The next try
# gets another address than the one that was taken meanwhile. An unknown outcome takes the records' return.
EXPECTED: list[tuple[errors.ProvisioningError, int, str | None]] = [
    (errors.ProvisioningError("why"), 503, "5"),
    (errors.InvalidCredentialsError("field", "reason"), 422, None),
    (errors.DuplicatePeerError("node-1", {}), 409, None),
    (errors.KeyTakenError("node-1"), 409, None),
    (errors.PeerNotFoundError("node-1"), 404, None),
    (errors.InterfaceNotFoundError("wg0"), 404, None),
    (POOL_FULL, 503, "60"),
    (errors.PeerLimitError("wg0", 65536), 503, "60"),
    (errors.AddressTakenError("10.0.0.2"), 503, "1"),
    (errors.HubUpdateError("why"), 503, "5"),
    (errors.ConfigFileError("path", "problem", "remedy"), 503, "5"),
    (errors.PausedError("why", 7, 9, "look"), 503, "5"),
    (errors.RecordsUnavailableError("why"), 503, "5"),
    (errors.OvertakenError(), 503, "5"),
    (errors.OutcomeUnknownError("why"), 503, "10"),
    (errors.AccessError("why"), 403, None),
    (errors.AuthenticationOffError("admin"), 403, None),
    (errors.UnauthenticatedError("missing"), 401, None),
    (errors.ForbiddenError("admin"), 403, None),
    (errors.RateLimitedError(7), 429, "7"),
    (errors.CredentialNotFoundError("token 1"), 404, None),
    (errors.NoProofAskedError(), 404, None),
    (errors.IdempotencyKeyError("why"), 422, None),
    (errors.ProofError(), 401, None),
    (errors.ProofMissingError("X-Node-Nonce"), 401, None),
    (errors.ClockError(), 401, None),
    (errors.SignatureError(), 401, None),
    (errors.NonceError(), 401, None),
    (errors.ChallengeError(), 401, None),
]


def descendants(kind: type[errors.ProvisioningError]) -> set[type[errors.ProvisioningError]]:
    return {kind}.union(*(descendants(below) for below in kind.__subclasses__()))


@pytest.mark.parametrize(("error", "status", "retry_after"), EXPECTED, ids=lambda value: type(value).__name__)
def test_each_error_has_its_status_and_retry_after(
    error: errors.ProvisioningError, status: int, retry_after: str | None
) -> None:
    response = answer(error)
    assert response.status_code == status
    assert response.headers.get("Retry-After") == retry_after
    assert response.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)


def test_no_error_is_left_out_here() -> None:
    defined = {kind for kind in descendants(errors.ProvisioningError) if kind.__module__ == errors.__name__}
    assert {type(error) for error, _, _ in EXPECTED} == defined
    of_the_body = {BodyTooLargeError, RequestValidationError, StrictJSONError}
    assert set(ANSWERS) - of_the_body <= defined


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (POOL_FULL, "IP pool exhausted: 253 addresses allocated from range 10.0.0.0/24"),
        (
            errors.DuplicatePeerError("node-1", {"node_id": "node-1"}),
            {"message": "Peer node-1 is already provisioned", "existing_config": {"node_id": "node-1"}},
        ),
        (
            errors.InvalidCredentialsError("wireguard_public_key", "the hub's own"),
            [{"type": "value_error", "loc": ["body", "wireguard_public_key"], "msg": "the hub's own"}],
        ),
        (
            errors.IdempotencyKeyError("sent once"),
            [{"type": "value_error", "loc": ["header", "Idempotency-Key"], "msg": "sent once"}],
        ),
    ],
)
def test_detail_has_the_form_that_callers_read(error: errors.ProvisioningError, detail: Any) -> None:
    assert json.loads(bytes(answer(error).body)) == {"detail": detail}
