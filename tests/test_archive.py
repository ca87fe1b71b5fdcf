"""An archive that was torn, damaged or made by an attacker is refused, and writes nothing outside."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.adapters.backups import archive
from backend.errors import BackupError
from backend.models.backups import CONFIG, MANIFEST, RECORDS, Manifest
from tests.harness.backups import contents, manifest, packed
from tests.harness.torture import tried

# Longer than a block of tar, and not compressible to nothing.
FILES = {CONFIG: b"[Interface]\n" * 50, RECORDS: bytes(range(256)) * 30}


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in FILES.items():
        (source / name).write_bytes(text)
    target = io.BytesIO()
    archive.write(target, manifest(FILES), source)
    return target.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory


def refusal(source: io.BytesIO, place: Path) -> str:
    with pytest.raises(BackupError) as caught:
        archive.unpack(source, place)
    assert set(contents(place)) <= {CONFIG, RECORDS}
    assert {path.name for path in place.parent.iterdir()} <= {"scratch", "source"}
    return str(caught.value)


def text_of(said: Manifest) -> bytes:
    return said.model_dump_json().encode()


def test_what_was_written_is_unpacked_with_the_same_manifest(whole: bytes, place: Path) -> None:
    assert archive.unpack(io.BytesIO(whole), place) == manifest(FILES)
    assert contents(place) == FILES
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}
    assert archive.read_manifest(io.BytesIO(whole)) == manifest(FILES)


def test_tar_reads_it_too(whole: bytes, tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert tar.getnames() == [MANIFEST, CONFIG, RECORDS]
        file = tar.extractfile(CONFIG)
        assert file is not None
        assert file.read() == FILES[CONFIG]


@tried(60)
@given(st.data())
def test_archive_cut_off_anywhere_is_refused(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(whole) - 1))
    place = tmp_path / f"cut-{length}"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    with pytest.raises(BackupError, match=r"torn|no backup"):
        archive.unpack(io.BytesIO(whole[:length]), place)


@tried(60)
@given(st.data())
def test_archive_with_another_byte_anywhere_is_refused_or_says_the_same(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    place = tmp_path / f"flipped-{at}"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    try:
        said = archive.unpack(io.BytesIO(bytes(flipped)), place)
    except BackupError:
        return
    # Some bits of gzip's header mean nothing, and deflate can encode the same bytes in several ways: a run of
    # zeros as a copy of any other zeros.
    assert (said, contents(place)) == (manifest(FILES), FILES)


@tried(60)
@given(st.binary(max_size=2000))
def test_no_bytes_raise_anything_but_a_sentence(tmp_path: Path, found: bytes) -> None:
    for text in (found, gzip.compress(found)):
        with pytest.raises(BackupError):
            archive.unpack(io.BytesIO(text), tmp_path)
    with pytest.raises(BackupError):
        archive.unpack(packed([(MANIFEST, found)]), tmp_path)


@pytest.mark.parametrize("name", ["../wg0.conf", "/etc/passwd", "wg0.conf/", "./wg0.conf", "more"])
def test_unexpected_name_is_refused(place: Path, name: str) -> None:
    source = packed([(MANIFEST, text_of(manifest(FILES))), (name, FILES[CONFIG]), (RECORDS, FILES[RECORDS])])
    assert "something else stands where wg0.conf belongs" in refusal(source, place)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"x", b"L", b"S"],
)
def test_anything_but_a_plain_file_is_refused(place: Path, kind: bytes) -> None:
    header = tarfile.TarInfo(CONFIG)
    header.type, header.linkname = kind, "/etc/passwd"
    source = packed([(MANIFEST, text_of(manifest(FILES))), (header, b"" if kind != b"x" else FILES[CONFIG])])
    assert "no backup" in refusal(source, place)
    assert contents(place) == {}


def test_member_twice_and_member_more_are_refused(place: Path) -> None:
    usual = [(MANIFEST, text_of(manifest(FILES))), (CONFIG, FILES[CONFIG])]
    assert "belongs" in refusal(packed([*usual, (CONFIG, FILES[CONFIG])]), place)
    for path in place.iterdir():
        path.unlink()
    more = packed([*usual, (RECORDS, FILES[RECORDS]), ("more", b"x")])
    assert "more stands behind its last member" in refusal(more, place)


def test_contents_that_the_manifest_does_not_describe_are_refused(place: Path) -> None:
    for wrong, problem in ((FILES[CONFIG][:-1], "another size"), (FILES[CONFIG][:-1] + b"x", "isn't what")):
        source = packed([(MANIFEST, text_of(manifest(FILES))), (CONFIG, wrong)])
        assert problem in refusal(source, place)
        for path in place.iterdir():
            path.unlink()


def test_bomb_is_refused_before_it_is_unpacked(place: Path) -> None:
    zeros = bytes(30_000_000)
    source = packed(
        [(MANIFEST, text_of(manifest({CONFIG: b"", RECORDS: zeros}))), (CONFIG, b""), (RECORDS, zeros)]
    )
    assert "can't have come into" in refusal(source, place)
    assert contents(place) == {}
    assert "its manifest is too large" in refusal(packed([(MANIFEST, bytes(10**6))]), place)


def test_size_that_no_disk_has_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = text_of(manifest(FILES)).replace(b'"bytes":7680', b'"bytes":9000000000000000')
    assert "can't have come into" in refusal(packed([(MANIFEST, said)]), place)
    monkeypatch.setattr(archive, "_LARGEST_RATIO", 10**15)
    assert "make room" in refusal(packed([(MANIFEST, said)]), place)


def test_endless_input_does_not_fill_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = io.BytesIO()
    archive.copy_with_room(io.BytesIO(bytes(3_000_000)), target, place)
    assert target.tell() == 3_000_000
    monkeypatch.setattr(archive, "_SPARE_BYTES", 10**18)
    with Path("/dev/zero").open("rb") as zeros, pytest.raises(BackupError, match="make room"):
        archive.copy_with_room(zeros, target, place)
    assert target.tell() == 3_000_000


def test_newer_format_is_named_even_where_nothing_else_is_known(place: Path) -> None:
    source = packed([(MANIFEST, b'{"format": 2, "everything": "else"}')])
    assert "made by a newer version (its format is 2" in refusal(source, place)


@pytest.mark.parametrize(
    "text", [b"[]", b"{}", b'{"format": 1}', b'{"format": "1"}', b"\xff", b"[" * 30_000, b'{"format": true}']
)
def test_manifest_that_is_none_is_refused(place: Path, text: bytes) -> None:
    assert "its manifest can't be read" in refusal(packed([(MANIFEST, text)]), place)
