"""Why a node could not join."""


class JoinError(Exception):
    """The node could not be let in."""


class RefusedError(JoinError):
    """The hub said no: `status` is HTTP's, `detail` the hub's reason, `retry_after` in seconds or None."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(status, detail, retry_after)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"the hub answered {self.status}: {self.detail}"


class UnreachableError(JoinError):
    """The hub gave no answer."""

    def __str__(self) -> str:
        return f"the hub gave no answer: {self.args[0]}"


class AnswerError(JoinError):
    """What answered isn't the hub, or not one that this client understands."""
