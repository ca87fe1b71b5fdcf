"""Checks whether a provision would succeed now, without making a probe wait for a check that hangs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Final

from backend.errors import HubUpdateError


class Readiness:
    """Runs the checks in a thread of their own. Requests that come while they run share their outcome."""

    def __init__(
        self,
        checks: Sequence[tuple[str, Callable[[], None]]],
        *,
        live: bool,
        notices: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Run nothing yet. Each check has a name, and raises the error that a provision would meet.

        `live` is False where only the file is kept. `notices` are what an operator should know, though the
        service works.
        """
        self._checks = checks
        self.live: Final = live
        self.notices: Final = notices
        self._lock = Lock()  # guards _answer, so that one thread looks at a time
        self._answer: Future[None] | None = None
        # The name of the check that is running. Only the checking thread writes it.
        self._looking_at = ""

    def ask(self) -> Future[None]:
        """Return the outcome of the checks under way, or of new ones."""
        with self._lock:
            if self._answer is not None and not self._answer.done():
                return self._answer
            answer: Future[None] = Future()
            # A daemon: one that hangs must not keep the process from ending.
            Thread(target=self._look, args=(answer,), name="readiness", daemon=True).start()
            # Kept only once its thread runs: without one it would never be done.
            self._answer = answer
            return answer

    def hangs(self) -> HubUpdateError:
        """Return the error for a request that can't wait any longer."""
        return HubUpdateError(f"{self._looking_at} takes unusually long to answer; see whether it hangs")

    def _look(self, answer: Future[None]) -> None:
        try:
            for name, check in self._checks:
                self._looking_at = name
                check()
        except BaseException as exc:  # noqa: BLE001 - the probe is told of any failure
            answer.set_exception(exc)
        else:
            answer.set_result(None)
