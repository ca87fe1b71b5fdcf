"""What happens to a batch of changes, from its records to its outcome."""

import logging
from collections.abc import Iterable

from backend.errors import ProvisioningError
from backend.services.ports import BatchSteps, Change, NextBatch

log = logging.getLogger(__name__)


def run_sequence(next_batch: NextBatch, steps: BatchSteps) -> None:
    """Take batches through intent and apply, one after the other, for as long as they come at once.

    Where apply fails for good the intent is taken back. How far the hub has come is written with the next
    intent, or when nothing else is to do: it is for readers of the records, and no start relies on it.
    """
    while (batch := next_batch()) is not None:
        steps.intend(batch)
        if steps.apply(batch) is not None:
            steps.revoke(batch)


def settle(changes: Iterable[Change], error: ProvisioningError | None) -> None:
    """Tell each change its outcome: its own refusal, or else the error, or None for success."""
    for change in changes:
        try:
            change.settle(change.refusal or error)
        except Exception:
            # One that can't be told must not keep the others from being told.
            log.exception("settle_failed")
