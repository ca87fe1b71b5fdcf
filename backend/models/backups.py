"""What an archive says of itself: its manifest."""

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, Field

from backend.models.fields import FrozenModel
from backend.models.wireguard.keys import KEY_PATTERN

# Raised when an older version could not read the archive, or would misread it.
FORMAT: Final = 1
# The members of an archive, in this order.
MANIFEST: Final = "manifest.json"
CONFIG: Final = "wg0.conf"
RECORDS: Final = "records.sqlite"

_Generation = Annotated[int, Field(ge=0, lt=2**62)]


class Origin(StrEnum):
    """Why a backup was made. The first word of its file's name."""

    # By the service itself. Only these are deleted by age and count.
    AUTOMATIC = "auto"
    # By `backup create`.
    COMMAND = "manual"
    # By `backup restore`, of what it replaced.
    REPLACED = "replaced"


class Member(FrozenModel):
    """A file of the archive."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(FrozenModel):
    """The first member of an archive, as JSON. It holds no secret."""

    format: Literal[1] = FORMAT
    made_at: AwareDatetime
    origin: Origin
    service_version: str
    interface: str
    # The public half of the PrivateKey in wg0.conf; null in an archive without that file.
    hub_public_key: str | None = Field(pattern=KEY_PATTERN)
    generation: _Generation
    observed_generation: _Generation
    # The kind of database that the records were in. In the archive they are SQLite in any case.
    database: Literal["sqlite", "postgresql"]
    # Of Alembic.
    schema_revision: str = Field(pattern=r"^[0-9A-Za-z_]{1,32}$")
    peers: int = Field(ge=0)
    # By name. wg0.conf is missing where a restore found none to save.
    files: dict[Literal["wg0.conf", "records.sqlite"], Member] = Field(min_length=1)
