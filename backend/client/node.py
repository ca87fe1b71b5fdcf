"""A node, and how it asks a hub to let it in."""

import hashlib
import http.client
import json
import random
import re
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend.client.configuration import Configuration, json_object, json_text
from backend.client.errors import AnswerError, RefusedError, UnreachableError
from backend.errors import ChallengeError
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import Challenge, SignedRequest, WireGuardProof, answer_challenge, sign
from backend.models.fields import escaped
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey

# As the hub knows them: what base_url has in front belongs to a proxy that takes it off.
CHALLENGE_PATH: Final = "/api/v1/wireguard/challenge"
PROVISION_PATH: Final = "/api/v1/wireguard/provision"

_PORTS: Final = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}
_TRY_AGAIN: Final = frozenset({429, 502, 503, 504})
# Seconds. A hub that asks for a longer wait is not asked again.
_LONGEST_WAIT: Final = 300
_LONGEST_BACKOFF: Final = 30
_MAX_ANSWER_BYTES: Final = 64 * 1024
_MAX_DETAIL: Final = 1000
# libp2p's PrivateKey message around the 64 bytes of an Ed25519 key.
_PRIVATE_PROTOBUF: Final = bytes.fromhex("08011240")
_SEED_BYTES: Final = 32
# ASCII without spaces: what may stand in a header, or in a URL's path.
_VISIBLE: Final = re.compile(r"[!-~]*")
_CHALLENGE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_JITTER: Final = random.SystemRandom()


class Node:
    """A node's name and its two private keys, which never leave it."""

    __slots__ = ("identity", "identity_private_key", "node_id", "wireguard_private_key")

    def __init__(
        self, node_id: str, identity_private_key: Ed25519PrivateKey | bytes, wireguard_private_key: str
    ) -> None:
        """Take the identity's key as 32 bytes, or as libp2p keeps it: 64 bytes, or those in protobuf (68).

        The WireGuard key is what `wg genkey` prints. Raises ValueError.
        """
        if isinstance(identity_private_key, bytes):
            identity_private_key = _ed25519(identity_private_key)
        self.node_id = node_id
        self.identity_private_key = identity_private_key
        self.identity = NodeIdentity(identity_private_key.public_key().public_bytes_raw())
        self.wireguard_private_key = WireGuardPrivateKey.parse(wireguard_private_key.strip())

    @property
    def wireguard_public_key(self) -> WireGuardKey:
        """The public half of the WireGuard key."""
        return self.wireguard_private_key.public_key()

    def __repr__(self) -> str:
        return f"Node({self.node_id!r}, {self.identity.peer_id})"


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    retry_after: int | None
    body: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as exc:
            raise AnswerError("the answer is no JSON") from exc

    def refusal(self) -> RefusedError:
        try:
            detail = json_object(self.json())["detail"]
        except (AnswerError, KeyError, TypeError):
            detail = self.body.decode("utf-8", "backslashreplace")
        if isinstance(detail, dict) and "message" in detail:
            detail = detail["message"]
        text = detail if isinstance(detail, str) else json.dumps(detail)
        return RefusedError(self.status, escaped(text[:_MAX_DETAIL]), self.retry_after)


class Client:
    """Asks one hub. `base_url` is https://host[:port][/prefix]; http:// for the node's own host alone.

    The token is sent as it is: `allow_http` takes http:// to other hosts, for networks that are trusted with
    it. Where the hub's public key is known beforehand, give it as `hub_public_key`: no signature is then made
    for another hub, and no other hub's configuration is taken. Without it, the hub is who the connection
    leads to. With `require_proof` a hub that asks for no proofs is refused: without them, what answers need
    not be a hub at all, and a program that has the token can join under the node's name.
    """

    def __init__(  # noqa: PLR0913 - each has a default that is right for most
        self,
        base_url: str,
        token: str | None = None,
        *,
        hub_public_key: str | None = None,
        allow_http: bool = False,
        require_proof: bool = False,
        timeout: float = 10.0,
        attempts: int = 5,
        tls: ssl.SSLContext | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take the token as it was shown; `timeout` is in seconds, for each wait on the network.

        Raises ValueError.
        """
        url = _hub_url(base_url, allow_http=allow_http)
        self._host, self._prefix = url.hostname or "", url.path.rstrip("/")
        # Never none: http.client would look for a port in the host, and find the end of an IPv6 address.
        self._port = _PORTS[url.scheme] if url.port is None else url.port
        self._tls = (tls or ssl.create_default_context()) if url.scheme == "https" else None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token is not None:
            token = token.strip()
            if not token or not _VISIBLE.fullmatch(token):
                # http.client would say so, too, and show it.
                raise ValueError("the token has characters that no token has")
            self._headers["Authorization"] = f"Bearer {token}"
        self._hub_public_key = None if hub_public_key is None else WireGuardKey.parse(hub_public_key)
        self._require_proof = require_proof
        self._timeout = timeout
        self._attempts = attempts
        self._sleep = sleep
        self._clock = clock

    def provision(
        self,
        node: Node,
        *,
        version: str,
        capabilities: Mapping[str, object] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Configuration:
        """Join, or find that the node has joined already with the same keys; return its configuration.

        It asks up to `attempts` times where the hub is busy or can't be reached. Raises RefusedError,
        UnreachableError or AnswerError.
        """
        fields: dict[str, object] = {
            "node_id": node.node_id,
            "public_key": node.identity.peer_id,
            "wireguard_public_key": node.wireguard_public_key,
            "capabilities": dict(capabilities or {}),
            "version": version,
        }
        if metadata is not None:
            fields["metadata"] = dict(metadata)
        # Signed, hashed and sent as these very bytes; the key tells the hub that a retry is one.
        body = json.dumps(fields, allow_nan=False).encode()
        idempotency_key = secrets.token_hex(16)
        attempt = 1
        while True:
            try:
                return self._ask(node, body, idempotency_key)
            except (RefusedError, UnreachableError) as error:
                wait = _wait(error, attempt)
                if wait is None or attempt >= self._attempts:
                    raise
            self._sleep(wait)
            attempt += 1

    def _ask(self, node: Node, body: bytes, idempotency_key: str) -> Configuration:
        headers = {"Idempotency-Key": idempotency_key, **self._proofs(node, body)}
        answer = self._post(PROVISION_PATH, body, headers)
        if answer.status == HTTPStatus.OK:
            configuration = Configuration.from_json(_member(answer.json(), "config"))
        elif answer.status == HTTPStatus.CONFLICT:
            configuration = _existing(answer)
        else:
            raise answer.refusal()
        if configuration.node_id != node.node_id:
            raise AnswerError("the configuration is another node's")
        self._check_hub(configuration.hub_public_key)
        return configuration

    def _proofs(self, node: Node, body: bytes) -> dict[str, str]:
        """Return the headers that prove both keys, made anew each time; none where the hub asks for none.

        Raises AnswerError for that where `require_proof` was given.
        """
        request = json.dumps({"wireguard_public_key": node.wireguard_public_key}).encode()
        answer = self._post(CHALLENGE_PATH, request, {})
        if answer.status == HTTPStatus.NOT_FOUND and self._require_proof:
            raise AnswerError("the hub asks for no proof, and this client requires one")
        if answer.status == HTTPStatus.NOT_FOUND:
            return {}
        if answer.status != HTTPStatus.OK:
            raise answer.refusal()
        challenge, audience = _challenge(answer.json())
        self._check_hub(audience)
        body_sha256 = hashlib.sha256(body).digest()
        signed = SignedRequest("POST", PROVISION_PATH, audience, body_sha256)
        proof = sign(node.identity_private_key, signed, int(self._clock()))
        try:
            mac = answer_challenge(node.wireguard_private_key, challenge, body_sha256)
        except ChallengeError as exc:
            raise AnswerError("the challenge is none") from exc
        return proof.headers() | WireGuardProof(challenge.challenge_id, mac).headers()

    def _check_hub(self, public_key: WireGuardKey) -> None:
        if self._hub_public_key not in (None, public_key):
            raise AnswerError("this isn't the hub whose public key is hub_public_key")

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> _Answer:
        """Send one request on its own connection. No redirect is followed: the token isn't for others."""
        connection = (
            http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
            if self._tls is None
            else http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=self._tls)
        )
        try:
            connection.request("POST", self._prefix + path, body, {**self._headers, **headers})
            response = connection.getresponse()
            data = response.read(_MAX_ANSWER_BYTES + 1)
            if response.length and len(data) <= _MAX_ANSWER_BYTES:
                raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException) as exc:
            raise UnreachableError(escaped(str(exc)) or type(exc).__name__) from exc
        finally:
            connection.close()
        if len(data) > _MAX_ANSWER_BYTES:
            raise AnswerError(f"the answer is larger than {_MAX_ANSWER_BYTES // 1024} KiB")
        return _Answer(response.status, _seconds(response.headers.get("Retry-After")), data)


def _hub_url(text: str, *, allow_http: bool) -> SplitResult:
    url = urlsplit(text)
    extra = url.username or url.query or url.fragment
    if url.scheme not in {"http", "https"} or not url.hostname or extra or not _VISIBLE.fullmatch(url.path):
        raise ValueError("base_url is http(s)://host[:port][/prefix]")
    if url.scheme == "http" and not allow_http and not _is_loopback(url.hostname):
        raise ValueError("http:// shows the token to the network: use https://, or allow_http=True")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ed25519(raw: bytes) -> Ed25519PrivateKey:
    if len(raw) == len(_PRIVATE_PROTOBUF) + 2 * _SEED_BYTES:
        raw = raw.removeprefix(_PRIVATE_PROTOBUF)
    if len(raw) not in {_SEED_BYTES, 2 * _SEED_BYTES}:
        raise ValueError(
            "an Ed25519 private key is 32 bytes, 64 as libp2p has it, or 68 in its protobuf form"
        )
    key = Ed25519PrivateKey.from_private_bytes(raw[:_SEED_BYTES])
    if raw[_SEED_BYTES:] not in (b"", key.public_key().public_bytes_raw()):
        raise ValueError("the two halves of the Ed25519 key don't belong together")
    return key


def _wait(error: RefusedError | UnreachableError, attempt: int) -> float | None:
    """Return the seconds after which to try again, or None if that is no use."""
    seconds: float = min(2.0 ** (attempt - 1), _LONGEST_BACKOFF)
    if isinstance(error, RefusedError):
        if error.status not in _TRY_AGAIN or (error.retry_after or 0) > _LONGEST_WAIT:
            return None
        if error.retry_after is not None:
            seconds = error.retry_after
    # Nodes that were sent away together don't come back together.
    return seconds * (1 + _JITTER.random() / 4)


def _existing(answer: _Answer) -> Configuration:
    """Return what a node gets that has joined before with these keys; raise the refusal for any other."""
    existing = _member(_member(answer.json(), "detail"), "existing_config")
    if not isinstance(existing, dict) or "hub_public_key" not in existing:
        raise answer.refusal()
    return Configuration.from_json(existing)


def _challenge(value: object) -> tuple[Challenge, WireGuardKey]:
    try:
        fields = json_object(value)
        challenge_id = json_text(fields["challenge_id"])
        challenge = Challenge(
            challenge_id, json_text(fields["server_public_key"]), json_text(fields["challenge"])
        )
        audience = WireGuardKey.parse(json_text(fields["audience"]))
    except (KeyError, TypeError, ValueError) as exc:
        raise AnswerError("the challenge is none") from exc
    if _CHALLENGE_ID.fullmatch(challenge_id) is None:
        raise AnswerError("the challenge is none")
    return challenge, audience


def _member(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _seconds(retry_after: str | None) -> int | None:
    """Read a Retry-After in seconds. The form with a date is as good as none."""
    text = (retry_after or "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
