"""Archives for tests, also such as an attacker would make, and hubs that are backed up and restored."""

import gzip
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.models.backups import CONFIG, RECORDS, Manifest, Member, Origin
from backend.models.wireguard.records import RecordedState
from tests.harness.command_line import hub_settings, invoke
from tests.harness.records import adding

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


@dataclass
class Place:
    """A hub that is a file and records, and no service."""

    directory: Path
    database_url: str = ""
    settings: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.config = self.directory / "wg0.conf"
        self.state = self.directory / "state"
        self.backups = self.state / "backups"
        self.url = self.database_url or f"sqlite:///{self.state}/provisioning.sqlite"
        self.settings = {**hub_settings(self.directory), "ENABLE_DBOS": "true", "DATABASE_URL": self.url}

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return invoke(*map(str, arguments), directory=self.directory, settings=self.settings)

    def init(self) -> None:
        assert self.run("hub", "init").returncode == 0
        with closing(Database(self.url)) as database:
            database.migrate()

    def commit(self, generation: int, *numbers: int) -> None:
        with closing(Database(self.url)) as database:
            database.migrate()
            records = SqlRecords(database)
            records.commit(generation, 0, [adding(f"node-{n}", f"10.0.0.{n}") for n in numbers])

    def back_up(self) -> Path:
        made = self.run("backup", "create")
        assert made.returncode == 0, made.stderr
        return Path(made.stdout.strip())

    def restore(self, archive: Path, *options: str) -> str:
        done = self.run("backup", "restore", archive, "--yes", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def refusal(self, archive: object, *options: str) -> str:
        refused = self.run("backup", "restore", archive, *options)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        return refused.stderr

    def records(self) -> RecordedState:
        with closing(Database(self.url)) as database:
            return SqlRecords(database).load()

    def names(self) -> list[str]:
        return [peer.node_id for peer in self.records().peers]

    def saved(self) -> list[Path]:
        return sorted(self.backups.glob("replaced-*"))
