"""Every error has a word for the audit log and a sentence for the caller, and survives pickle."""

import pickle
from collections.abc import Iterator
from typing import Final

import pytest

from backend import errors

SAMPLES: Final = [
    (errors.ProvisioningError(), "failed"),
    (errors.ProvisioningError("why"), "failed"),
    (errors.InvalidCredentialsError("public_key", "what was sent"), "invalid"),
    (errors.DuplicatePeerError("node-1", {"assigned_ip": "10.0.0.2"}), "duplicate"),
    (errors.KeyTakenError("node-1"), "duplicate"),
    (errors.PeerNotFoundError("node-1"), "not_found"),
    (errors.InterfaceNotFoundError("wg0"), "not_found"),
    (errors.IPPoolExhaustedError("10.0.0.0/24", 253), "pool_exhausted"),
    (errors.PeerLimitError("wg0", 65536), "pool_exhausted"),
    (errors.AddressTakenError("10.0.0.2"), "address_taken"),
    (errors.HubUpdateError("why"), "hub"),
    (errors.ConfigFileError("/etc/wireguard/wg0.conf", "no key", "mend it"), "hub"),
    (errors.PausedError("why", 7, 9, "reconcile --show"), "hub"),
    (errors.RecordsUnavailableError("why"), "records"),
    (errors.OvertakenError(), "records"),
    (errors.OutcomeUnknownError("why"), "records"),
    (errors.UnauthenticatedError("used_up", "0" * 16), "used_up"),
    (errors.ForbiddenError("admin"), "forbidden"),
    (errors.AuthenticationOffError("admin"), "authentication_off"),
    (errors.RateLimitedError(7), "rate"),
    (errors.CredentialNotFoundError("0" * 16), "not_found"),
    (errors.NoProofAskedError(), "status_404"),
    (errors.IdempotencyKeyError("why"), "idempotency_key"),
    (errors.ProofMissingError("X-Node-Nonce"), "missing"),
    (errors.ClockError(), "clock"),
    (errors.SignatureError(), "signature"),
    (errors.NonceError(), "nonce"),
    (errors.ChallengeError(), "challenge"),
]
BASES: Final = {errors.AccessError, errors.ProofError}


def descendants(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for each in kind.__subclasses__():
        yield from descendants(each)


def test_every_class_has_a_sample() -> None:
    declared = {kind for kind in descendants(errors.ProvisioningError) if kind.__module__ == errors.__name__}
    assert {type(error) for error, _ in SAMPLES} == declared - BASES


@pytest.mark.parametrize(("error", "word"), SAMPLES, ids=lambda value: type(value).__name__)
def test_error_has_a_word_for_the_audit_log_and_a_sentence(
    error: errors.ProvisioningError, word: str
) -> None:
    assert error.audit_reason == word
    assert str(error)
    assert str(error) != type(error).__doc__


@pytest.mark.parametrize("error", [error for error, _ in SAMPLES], ids=repr)
def test_error_survives_pickle(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
