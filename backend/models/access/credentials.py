"""Enrolment tokens and operator keys: what is kept of them, and their shapes over HTTP."""

import hmac
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, Final, NoReturn, Self

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    StringConstraints,
)

from backend.models.access.secret_text import SECRET_TEXT, require_no_secret
from backend.models.fields import FrozenModel, StrictModel, is_mapped, printable, unmapped
from backend.models.wireguard.provisioning import UtcSecond

_HOUR: Final = 3600
_YEAR: Final = 365 * 24 * _HOUR

Network = IPv4Network | IPv6Network


class Role(StrEnum):
    """What an operator's key is for. Each role covers the ones before it; as text they don't compare so."""

    READ = "read"
    OPERATE = "operate"
    ADMIN = "admin"

    def covers(self, other: "Role") -> bool:
        """Say whether who has this role may do what the other one is for."""
        order = list(Role)
        return order.index(self) >= order.index(other)


class Permission(StrEnum):
    """What an endpoint asks for."""

    PROVISION = "provision"
    READ = "read"
    OPERATE = "operate"
    ADMINISTER = "administer"

    @property
    def role(self) -> Role:
        """The least role that has it."""
        return _LEAST_ROLE[self]


_LEAST_ROLE: Final = {
    Permission.PROVISION: Role.OPERATE,
    Permission.READ: Role.READ,
    Permission.OPERATE: Role.OPERATE,
    Permission.ADMINISTER: Role.ADMIN,
}


class CredentialKind(StrEnum):
    """A token lets nodes in; a key is an operator's."""

    TOKEN = "token"  # noqa: S105 - a kind, no secret
    KEY = "key"


class CredentialState(StrEnum):
    """What has become of a credential. Where two apply, it is the first of revoked, expired, used up."""

    ACTIVE = "active"
    USED_UP = "used_up"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """The text `ocw_<id>_<secret>` that a caller shows. It shows itself to nobody but by `reveal`."""

    id: str
    _secret: str

    @classmethod
    def generate(cls) -> Self:
        """Make a new one, of 256 random bits."""
        return cls(secrets.token_hex(8), secrets.token_hex(32))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a caller sent; raise a ValueError that doesn't repeat it."""
        found = SECRET_TEXT.fullmatch(text)
        if found is None:
            raise ValueError("a credential is ocw_, 16 hexadecimal digits, _, and 64 more, in lower case")
        return cls(found[1], found[2])

    @property
    def digest(self) -> str:
        """What is stored: the SHA-256 of the secret's 64 characters, in hexadecimal.

        A slow hash is for what people choose; nobody tries 2^256.
        """
        return sha256(self._secret.encode("ascii")).hexdigest()

    def reveal(self) -> str:
        """Return the whole text, for the one answer that shows it."""
        return f"ocw_{self.id}_{self._secret}"

    def __repr__(self) -> str:
        return f"Secret(ocw_{self.id}_***)"

    def __reduce__(self) -> NoReturn:
        # What is pickled may end in a file or a database, where no secret may come.
        raise TypeError("a secret is not pickled")


@dataclass(frozen=True, slots=True)
class Credential:
    """One credential as it is stored. A token has `max_uses` and no role, a key the other way round."""

    id: str
    kind: CredentialKind
    role: Role | None
    secret_hash: str = field(repr=False)
    note: str
    created_at: datetime
    # An audit name: `key:<id>`, `cli:<os user>`, `local`.
    created_by: str
    # None: never.
    expires_at: datetime | None = None
    max_uses: int | None = None
    uses: int = 0
    node_id_pattern: str | None = None
    source_cidr: Network | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None

    def matches(self, secret: Secret) -> bool:
        """Say whether this is the credential that the secret is of, in constant time."""
        return hmac.compare_digest(self.id + self.secret_hash, secret.id + secret.digest)

    def may(self, permission: Permission) -> bool:
        """Say whether it gives the permission to a caller whom it authenticates."""
        if self.role is None:
            return permission is Permission.PROVISION
        return self.role.covers(permission.role)

    def refusal(self, now: datetime, source: str | None) -> str | None:
        """Return why it authenticates no caller from this source, as a word for the audit log, or None.

        `source` is an IP address, or None for a UNIX socket, which is in no network. Whether a token has a
        use left is for TokenUses to say, and in the end for the records.
        """
        ended = self.ended(now)
        if ended is None and self.source_cidr is not None and not _within(source, self.source_cidr):
            return "source"
        return ended

    def ended(self, now: datetime) -> str | None:
        """Return `revoked` or `expired`, or None while neither applies."""
        if self.revoked_at is not None:
            return CredentialState.REVOKED.value
        if self.expires_at is not None and self.expires_at <= now:
            return CredentialState.EXPIRED.value
        return None

    def is_for(self, node_id: str) -> bool:
        """Say whether it lets in nodes of this name."""
        return self.node_id_pattern is None or fnmatchcase(node_id, self.node_id_pattern)

    def state(self, now: datetime) -> CredentialState:
        """Say what has become of it, as far as its row tells."""
        ended = self.ended(now)
        if ended is not None:
            return CredentialState(ended)
        used_up = self.max_uses is not None and self.uses >= self.max_uses
        return CredentialState.USED_UP if used_up else CredentialState.ACTIVE


@lru_cache(maxsize=4096)
def _within(source: str | None, network: Network) -> bool:
    try:
        address = ip_address(source or "")
    except ValueError:
        return False
    return unmapped(address) in network


def _network(value: Any) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str) or "%" in value:
        raise ValueError("a network is written like 192.0.2.0/24 or 2001:db8::/32, without a zone")
    try:
        network = ip_network(value)
    except ValueError:
        # Its own message repeats what was sent.
        raise ValueError(
            "not a network; write one like 192.0.2.0/24 or 2001:db8::/32, without host bits"
        ) from None
    if is_mapped(network):
        raise ValueError("IPv4 callers count as IPv4; write the network as such, like 192.0.2.0/24")
    return network


Note = Annotated[
    str,
    StringConstraints(max_length=256),
    AfterValidator(printable),
    Field(description="What the operator wants to remember."),
]
NodeIdPattern = Annotated[
    str,
    # No brackets: fnmatch would read a set of characters.
    StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_*?-]{1,128}$"),
    AfterValidator(require_no_secret),
    Field(
        description="Only nodes of such a name are let in: `*` is any run of characters, `?` any one.",
        examples=["swarm-node-*"],
    ),
]
SourceNetwork = Annotated[
    Network,
    PlainValidator(_network, json_schema_input_type=str),
    Field(description="Only callers from this network are let in.", examples=["192.0.2.0/24"]),
]


class TokenRequest(StrictModel):
    """What an operator asks of a new enrolment token."""

    max_uses: int = Field(default=1, ge=1, le=1_000_000, description="How many nodes it lets in.")
    expires_in: int = Field(default=_HOUR, ge=1, le=_YEAR, description="Seconds from now.")
    node_id_pattern: NodeIdPattern | None = None
    source_cidr: SourceNetwork | None = None
    note: Note = ""

    def make(self, created_by: str, now: datetime) -> tuple[Credential, Secret]:
        """Make the token; the secret is nowhere else."""
        secret = Secret.generate()
        token = Credential(
            id=secret.id,
            kind=CredentialKind.TOKEN,
            role=None,
            secret_hash=secret.digest,
            note=self.note,
            created_at=now,
            created_by=created_by,
            expires_at=now + timedelta(seconds=self.expires_in),
            max_uses=self.max_uses,
            node_id_pattern=self.node_id_pattern,
            source_cidr=self.source_cidr,
        )
        return token, secret


class KeyRequest(StrictModel):
    """What an operator asks of a new key."""

    # A role comes as its text, which a strict model takes from JSON alone.
    role: Annotated[Role, Field(strict=False)]
    expires_in: int | None = Field(
        default=None, ge=1, le=10 * _YEAR, description="Seconds from now; null for never."
    )
    note: Note = ""

    def make(self, created_by: str, now: datetime) -> tuple[Credential, Secret]:
        """Make the key; the secret is nowhere else."""
        secret = Secret.generate()
        key = Credential(
            id=secret.id,
            kind=CredentialKind.KEY,
            role=self.role,
            secret_hash=secret.digest,
            note=self.note,
            created_at=now,
            created_by=created_by,
            expires_at=None if self.expires_in is None else now + timedelta(seconds=self.expires_in),
        )
        return key, secret


class _Info(FrozenModel):
    """What both kinds tell of themselves."""

    id: str = Field(examples=["3f1c0e5a9b7d2468"])
    note: str
    created_at: UtcSecond = Field(description="RFC 3339, UTC.")
    created_by: str = Field(examples=["cli:root"])
    expires_at: UtcSecond | None
    revoked_at: UtcSecond | None
    last_used_at: UtcSecond | None
    state: CredentialState

    @classmethod
    def of(cls, credential: Credential, now: datetime) -> Self:
        """Tell of a credential everything but its hash."""
        return cls(**cls._values(credential, now))

    @classmethod
    def _values(cls, credential: Credential, now: datetime) -> dict[str, Any]:
        stored = [name for name in cls.model_fields if name in Credential.__dataclass_fields__]
        return {name: getattr(credential, name) for name in stored} | {"state": credential.state(now)}


class TokenInfo(_Info):
    """An enrolment token, without its secret."""

    max_uses: int
    uses: int
    node_id_pattern: str | None
    source_cidr: Network | None


class KeyInfo(_Info):
    """An operator's key, without its secret."""

    role: Role


class MadeToken(TokenInfo):
    """A token that was just made, with its secret, which is never shown again."""

    secret: str = Field(repr=False, description="Shown this once: ocw_<id>_<secret>.")

    @classmethod
    def made(cls, token: Credential, secret: Secret, now: datetime) -> Self:
        """Tell of a token, once with its secret."""
        return cls(**cls._values(token, now), secret=secret.reveal())


class MadeKey(KeyInfo):
    """A key that was just made, with its secret, which is never shown again."""

    secret: str = Field(repr=False, description="Shown this once: ocw_<id>_<secret>.")

    @classmethod
    def made(cls, key: Credential, secret: Secret, now: datetime) -> Self:
        """Tell of a key, once with its secret."""
        return cls(**cls._values(key, now), secret=secret.reveal())
