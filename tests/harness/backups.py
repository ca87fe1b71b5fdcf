"""Archives for tests: whole ones, and what an attacker or a torn copy makes of them."""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from backend.models.backups import CONFIG, RECORDS, Manifest, Member, Origin

NOON: Final = datetime(2026, 2, 19, 12, tzinfo=UTC)
HUB_KEY: Final = "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="


def manifest(files: dict[str, bytes] | None = None, **over: Any) -> Manifest:
    """Return a manifest of a backup with these files."""
    contents = {CONFIG: b"config", RECORDS: b"records"} if files is None else files
    values: dict[str, Any] = {
        "made_at": NOON,
        "origin": Origin.AUTOMATIC,
        "service_version": "1",
        "interface": "wg0",
        "hub_public_key": HUB_KEY,
        "generation": 7,
        "observed_generation": 7,
        "database": "sqlite",
        "schema_revision": "0005",
        "peers": 3,
        "files": {
            name: Member(sha256=hashlib.sha256(text).hexdigest(), bytes=len(text))
            for name, text in contents.items()
        },
    }
    return Manifest(**{**values, **over})


def packed(members: Sequence[tuple[tarfile.TarInfo | str, bytes]]) -> io.BytesIO:
    """Return an archive of these members; a name stands for the header of a plain file."""
    target = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", 1, target, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.GNU_FORMAT) as tar,
    ):
        for given, text in members:
            header = tarfile.TarInfo(given) if isinstance(given, str) else given
            header.size = len(text)
            tar.addfile(header, io.BytesIO(text))
    target.seek(0)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
