"""The form of an archive: a gzipped tar(5) of manifest.json, wg0.conf and records.sqlite, in this order.

An archive may come from anywhere, so it is read header by header: a regular file with the next expected name
and the size that the manifest states, or the archive is refused. No name in it is ever used as a path.
"""

import gzip
import hashlib
import json
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Final

from pydantic import ValidationError

from backend.errors import BackupError
from backend.models.backups import CONFIG, FORMAT, MANIFEST, RECORDS, Manifest, Member

_MIB: Final = 1024 * 1024
_CHUNK_BYTES: Final = _MIB
# zlib's fastest: the others take three times as long for a tenth less.
_LEVEL: Final = 1
_MOST_MANIFEST_BYTES: Final = 64 * 1024
# Records and config shrink to a quarter or less; an archive that grows by more than this is a bomb.
_LARGEST_RATIO: Final = 200
# Unpacked records are there up to three times: the copy, what is rebuilt from it, and the write-ahead log
_UNPACKED: Final = 3
# Left free on the disk that an archive is unpacked to: the service's own records are on it.
_SPARE_BYTES: Final = 16 * _MIB


def make_file(path: Path) -> IO[bytes]:
    """Make a file that is its owner's alone from birth, whatever the umask; raise OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, stat.S_IRUSR | stat.S_IWUSR), "wb")


def member_of(path: Path) -> Member:
    """Return the manifest's entry for a file; raise OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Member(sha256=digest.hexdigest(), bytes=file.tell())


def write(target: IO[bytes], manifest: Manifest, directory: Path) -> None:
    """Write the archive of the files that the manifest names, which are in `directory`; raise OSError."""
    text = manifest.model_dump_json(indent=1).encode()
    with (
        # Without the time, and the name that the file has at the moment.
        gzip.GzipFile("", "wb", _LEVEL, target, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.GNU_FORMAT) as tar,
    ):
        tar.addfile(_header(MANIFEST, len(text), manifest), BytesIO(text))
        for name in (CONFIG, RECORDS):
            if (member := manifest.files.get(name)) is not None:
                with (directory / name).open("rb") as file:
                    tar.addfile(_header(name, member.bytes, manifest), file)


def _header(name: str, size: int, manifest: Manifest) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = size, 0o600, int(manifest.made_at.timestamp())
    return header


def read_manifest(source: IO[bytes]) -> Manifest:
    """Read the manifest alone; raise BackupError."""
    with _readable(source) as archive:
        return _manifest(archive)


def unpack(source: IO[bytes], directory: Path) -> Manifest:
    """Unpack a whole archive into a directory, and check sizes and hashes; raise BackupError or OSError.

    `source` is a file, whose size bounds what is unpacked.
    """
    packed = source.seek(0, 2)
    source.seek(0)
    with _readable(source) as archive:
        manifest = _manifest(archive)
        _require_room(manifest, packed, directory)
        for name in (CONFIG, RECORDS):
            if (member := manifest.files.get(name)) is None:
                continue
            header = _header_of(archive, name)
            if header.size != member.bytes:
                raise BackupError(f"this is no backup: {name} has another size than the manifest says")
            _unpack_member(archive, directory / name, member)
        _require_end(archive)
    return manifest


@contextmanager
def _readable(source: IO[bytes]) -> Iterator[gzip.GzipFile]:
    """Yield what is in the gzip; turn what a damaged one raises into BackupError."""
    try:
        with gzip.GzipFile(fileobj=source, mode="rb") as archive:
            yield archive
    except EOFError:
        raise BackupError("the backup is torn: its end is missing") from None
    except (gzip.BadGzipFile, zlib.error) as exc:
        raise BackupError(f"this is no backup, or a damaged one ({exc})") from None


def _manifest(archive: gzip.GzipFile) -> Manifest:
    header = _header_of(archive, MANIFEST)
    if header.size > _MOST_MANIFEST_BYTES:
        raise BackupError("this is no backup: its manifest is too large")
    text = _exactly(archive, header.size)
    _exactly(archive, -header.size % tarfile.BLOCKSIZE)
    try:
        found = json.loads(text)
        number = found["format"]
        if isinstance(number, int) and number > FORMAT:
            raise BackupError(
                f"the backup was made by a newer version (its format is {number}, and this version knows "
                f"{FORMAT}); use that version"
            )
        return Manifest.model_validate(found)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        # The first wrong field, without what stands in it.
        wrong = exc.errors(include_input=False)[0]["loc"] if isinstance(exc, ValidationError) else ()
        place = f" ({'.'.join(map(str, wrong))})" if wrong else ""
        raise BackupError(f"this is no backup: its manifest can't be read{place}") from None


def _header_of(archive: gzip.GzipFile, name: str) -> tarfile.TarInfo:
    """Read the next header, which has to be that of a plain file of this name."""
    block = archive.read(tarfile.BLOCKSIZE)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError:
        raise BackupError(f"this is no backup: {name} isn't where it belongs") from None
    # Neither links nor the extensions, which are headers with contents of their own.
    if header.name != name or header.type != tarfile.REGTYPE or header.size < 0:
        raise BackupError(f"this is no backup: something else stands where {name} belongs")
    return header


def _require_room(manifest: Manifest, packed: int, directory: Path) -> None:
    size = sum(member.bytes for member in manifest.files.values())
    if size > packed * _LARGEST_RATIO:
        raise BackupError(f"this is no backup: {size} bytes can't have come into {packed}")
    require_room(directory, size * _UNPACKED)


def require_room(directory: Path, needed: int) -> None:
    """Raise BackupError where so many bytes could fill a directory's disk; raise OSError."""
    if needed + _SPARE_BYTES > (free := shutil.disk_usage(directory).free):
        # Rounded: a failure is logged again where its text is another.
        raise BackupError(
            f"the work on the backup takes up to {-(-needed // _MIB)} MiB more, and the disk of {directory} "
            f"has {free // _MIB}, of which {_SPARE_BYTES // _MIB} are to stay free; make room on it, or set "
            "STATE_DIRECTORY to another one"
        )


def copy_with_room(source: IO[bytes], target: IO[bytes], directory: Path) -> None:
    """Copy to a file in a directory; raise BackupError before its disk is full, OSError."""
    while chunk := source.read(_CHUNK_BYTES):
        require_room(directory, len(chunk))
        target.write(chunk)


def _unpack_member(archive: gzip.GzipFile, path: Path, member: Member) -> None:
    digest, left = hashlib.sha256(), member.bytes
    with make_file(path) as file:
        while left:
            chunk = _exactly(archive, min(left, _CHUNK_BYTES))
            digest.update(chunk)
            file.write(chunk)
            left -= len(chunk)
    _exactly(archive, -member.bytes % tarfile.BLOCKSIZE)
    if digest.hexdigest() != member.sha256:
        raise BackupError(f"the backup is damaged: {path.name} isn't what the manifest says")


def _exactly(archive: gzip.GzipFile, size: int) -> bytes:
    found = archive.read(size)
    if len(found) != size:
        raise BackupError("the backup is torn: its end is missing")
    return found


def _require_end(archive: gzip.GzipFile) -> None:
    """Require the end of the tar, and read to the gzip's, where its own check of everything is."""
    # Two empty blocks, and what fills the record that they are in.
    rest = archive.read(2 * tarfile.RECORDSIZE)
    if not 2 * tarfile.BLOCKSIZE <= len(rest) < 2 * tarfile.RECORDSIZE or rest.strip(b"\0"):
        raise BackupError("this is no backup: more stands behind its last member")


def manifest_of(path: Path) -> Manifest:
    """Read the manifest of the archive at `path`; raise BackupError where it can't be read."""
    try:
        with path.open("rb") as file:
            return read_manifest(file)
    except OSError as exc:
        raise BackupError(f"it can't be read ({exc.strerror or type(exc).__name__})") from exc
