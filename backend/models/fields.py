"""The base of what callers send: it refuses unknown fields and wrong types, with bounded work."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, model_validator

# More than any of these models has. Each unknown field is an error of its own, and 64 KiB hold thousands.
_MAX_FIELDS: Final = 32


class StrictModel(BaseModel):
    """Refuses unknown fields and does not turn one type into another."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"at most {_MAX_FIELDS} fields are allowed, these are {len(value)}")
        return value
