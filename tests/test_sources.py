"""Archives and DICOMDIRs: what is taken, what is refused and why, and that nothing is believed or left half done."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from pydicom import dcmread
from pydicom.fileset import FileSet

from medclr.errors import MedclrError
from medclr.sources import Brought, archive, bring, members, place
from tests.test_index import write_series

PLAIN = {"a/1.dcm": b"one" * 500, "a/2.dcm": b"two", "ü b/café.nii": b"three", "empty": b""}


def write_zip(path: Path, contents: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as opened:
        warnings.simplefilter("ignore")  # of a name that stands twice
        for name, content in contents.items():
            opened.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def write_tar(path: Path, contents: dict[str, bytes], mode: str = "w", **kinds: bytes) -> Path:
    with tarfile.open(path, mode) as opened:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
    return path


WRITERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "zip": write_zip,
    "zip, stored": lambda path, contents: write_zip(path, contents, zipfile.ZIP_STORED),
    "zip, bzip2": lambda path, contents: write_zip(path, contents, zipfile.ZIP_BZIP2),
    "tar": write_tar,
    "tar.gz": lambda path, contents: write_tar(path, contents, "w:gz"),
    "tar.bz2": lambda path, contents: write_tar(path, contents, "w:bz2"),
    "tar.xz": lambda path, contents: write_tar(path, contents, "w:xz"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def unpacked(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    brought = bring(path, path.parent / "copies")
    assert not list(brought.folder.rglob("*.tmp"))
    return contents(brought.folder), dict(brought.refused)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_archive_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "export.bin", PLAIN)
    assert unpacked(path) == (PLAIN, {})
    assert (tmp_path / "copies").stat().st_mode & 0o777 == 0o700
    assert "export" not in str(place(tmp_path / "copies", str(path)).relative_to(tmp_path))
    assert not list((tmp_path / "copies").rglob("*export*"))


def test_what_is_no_archive(tmp_path: Path) -> None:
    rest = b"\x5c\x01" + bytes(400)
    others = {
        "volume.nii.gz": gzip.compress(rest),
        "volume.nii.bz2": bz2.compress(rest),
        "volume.nii.xz": lzma.compress(rest),
        "image.dcm": bytes(128) + b"DICM" + bytes(600),
        "empty.tar": b"",
        "zeros.tar": bytes(10240),
        "broken.gz": b"\x1f\x8b" + rest,
    }
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    write_zip(tmp_path / "letter.docx", {"[Content_Types].xml": b"<xml>", "word/document.xml": b"Dear Dr"})
    write_zip(tmp_path / "viewer.jar", {"META-INF/MANIFEST.MF": b"", "a.class": b""})
    for path in tmp_path.iterdir():
        assert not archive.is_archive(path), path
        with pytest.raises(MedclrError, match=r"is neither a folder, a DICOMDIR nor a zip or tar archive$"):
            bring(path, tmp_path / "copies")
    with pytest.raises(MedclrError, match=r"no such folder or file$"):
        bring(tmp_path / "missing.zip", tmp_path / "copies")
    assert bring(tmp_path, tmp_path / "copies") == Brought(tmp_path)


BAD_NAMES = {
    "/etc/absolute": "absolute",
    "\\\\host\\share": "absolute",
    "C:\\scans\\1.dcm": "absolute",
    "c:1.dcm": "absolute",
    "../outside": "leads out",
    "a/../../outside": "leads out",
    "a\\..\\..\\outside": "leads out",
    "line\nbreak": "control character",
    "x" * 201: "too long",
    "/".join(["folder"] * 400): "too long",
    "A/1.DCM": "name of another",
    "u\u0308 b/cafe\u0301.nii": "name of another",
    "a": "name of another",
    "a/1.dcm/below": "lies in a folder that has the name of a file",
}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_names_that_are_refused(tmp_path: Path, kind: str) -> None:
    hidden = {".hidden/1": b"", "a/._1.dcm": b"", "__MACOSX/._a": b""}
    entries = PLAIN | dict.fromkeys(BAD_NAMES, b"bad") | hidden | {"./b//c": b"plain"}
    (tmp_path / "deep" / "er").mkdir(parents=True)
    taken, refused = unpacked(WRITERS[kind](tmp_path / "deep" / "er" / "export", entries))
    assert taken == PLAIN | {"b/c": b"plain"}
    assert len(refused) == len(BAD_NAMES)
    for name, reason in BAD_NAMES.items():
        assert reason in refused[members.printable(name)]
    everything = {path.name for path in tmp_path.rglob("*")}
    assert not everything & {"absolute", "outside", "1.DCM", "share"}


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a\udce9": b"latin", "b": b"plain"}, "w")
    assert unpacked(path) == ({"b": b"plain"}, {"a\\udce9": "has a name that is not UTF-8"})


def test_links_and_devices(tmp_path: Path) -> None:
    kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "disk": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE}
    taken, refused = unpacked(write_tar(tmp_path / "x.tar", PLAIN, **kinds))
    assert taken == PLAIN
    link, device = "is a link; give what it leads to", "is no plain file"
    assert refused == {"soft": link, "hard": link, "disk": device, "pipe": device}

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        for name, mode in (("soft", 0o120777), ("pipe", 0o010600), ("file", 0o100600)):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            opened.writestr(info, "/etc/passwd")
    assert unpacked(tmp_path / "x.zip") == ({"file": b"/etc/passwd"}, {"soft": link, "pipe": device})


def test_encrypted_and_overlapping_entries_and_unknown_methods(tmp_path: Path) -> None:
    path = write_zip(
        tmp_path / "x.zip", {"whole": b"1" * 50, "locked": b"2" * 50, "odd": b"3" * 50, "shared": b"4" * 50}
    )
    with zipfile.ZipFile(path) as opened:
        directory, offsets = opened.start_dir, {info.filename: info.header_offset for info in opened.infolist()}
    data = bytearray(path.read_bytes())
    at = directory
    while data[at : at + 4] == b"PK\1\2":
        name_size = int.from_bytes(data[at + 28 : at + 30], "little")
        name = data[at + 46 : at + 46 + name_size].decode()
        if name == "locked":
            data[at + 8] |= 1  # general purpose flag
        if name == "odd":
            data[at + 10 : at + 12] = (97).to_bytes(2, "little")  # compression method
        if name == "shared":
            data[at + 42 : at + 46] = offsets["odd"].to_bytes(4, "little")  # where it lies: on another
        at += 46 + name_size
    path.write_bytes(data)
    taken, refused = unpacked(path)
    assert taken == {"whole": b"1" * 50}
    assert refused["locked"] == "is encrypted; decrypt it first"
    assert "shares its bytes with another entry" in refused["odd"]
    assert "is damaged, or packed in an unknown way" in refused["shared"]  # the bytes there are another's


def test_a_declared_size_is_not_believed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a": b"a" * 5000, "b": b"plain"})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as opened:
        at = opened.start_dir
    data[at + 24 : at + 28] = (100).to_bytes(4, "little")  # uncompressed size
    path.write_bytes(data)
    taken, refused = unpacked(path)
    assert taken == {"b": b"plain"}
    assert refused.keys() == {"a"}


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_bombs_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archive, "HARMLESS_BYTES", 2**20)
    path = WRITERS[kind](tmp_path / "x", {"small": b"1", "large": bytes(6 * 2**20)})
    with pytest.raises(MedclrError, match="unfolds to more than 200 times its size"):
        unpacked(path)
    assert not contents(tmp_path / "copies")


def test_bombs_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MEMBERS", 100)
    with pytest.raises(MedclrError, match="holds more than 100 files"):
        unpacked(write_tar(tmp_path / "many.tar", {str(i): b"" for i in range(101)}))

    monkeypatch.setattr(archive, "HARMLESS_BYTES", 2**20)
    inner = write_zip(tmp_path / "inner", {"large": bytes(6 * 2**20)})
    with pytest.raises(MedclrError, match="unfolds to more than 200 times its size"):
        unpacked(write_zip(tmp_path / "nested.zip", {"inner.zip": inner.read_bytes()}))

    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**33  # tarfile would read all of it into memory
    (tmp_path / "header.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(MedclrError, match="declares a header of more than 16 MiB"):
        unpacked(tmp_path / "header.tar")

    back = tarfile.TarInfo("back")  # a negative size leads tarfile in a circle (CVE-2025-8194)
    block = bytearray(back.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfc\x00"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    (tmp_path / "back.tar").write_bytes(
        write_tar(tmp_path / "x", {"a": b"a"}).read_bytes()[:1024] + block + bytes(1024)
    )
    taken, refused = unpacked(tmp_path / "back.tar")
    assert taken == {"a": b"a"}
    assert "is damaged or incomplete" in refused[""]


def test_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "x.zip", PLAIN)
    monkeypatch.setattr(archive, "FREE_BYTES", 2**60)
    with pytest.raises(MedclrError, match=r"copies: less than .* GiB is left free on this disk; .* --copies"):
        unpacked(path)
    monkeypatch.undo()
    assert unpacked(path) == (PLAIN, {})


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_in_archives(tmp_path: Path, kind: str) -> None:
    innermost = WRITERS["tar"](tmp_path / "1", PLAIN).read_bytes()
    inner = WRITERS[kind](tmp_path / "2", PLAIN | {"deep.tar": innermost}).read_bytes()
    taken, refused = unpacked(
        WRITERS[kind](tmp_path / "3", {"p/study.zip": inner, "p/study.zip/a/1.dcm": b"", "q": b"q"})
    )
    assert taken == {f"p/study.zip/{name}": content for name, content in PLAIN.items()} | {"q": b"q"}
    assert refused.keys() == {"p/study.zip/deep.tar", "p/study.zip/a/1.dcm"}
    assert "is an archive in an archive in an archive" in refused["p/study.zip/deep.tar"]


@pytest.mark.parametrize("kind", WRITERS)
def test_of_a_damaged_archive_the_rest_is_read(tmp_path: Path, kind: str) -> None:
    random = Random(0)
    noise = {f"{i:02d}": random.randbytes(40_000) for i in range(30)}  # several blocks of bzip2
    path = WRITERS[kind](tmp_path / "whole", noise)
    whole = path.read_bytes()
    hurt = bytearray(whole)
    middle = len(hurt) * 9 // 10
    hurt[middle : middle + 2000] = bytes(2000)
    (tmp_path / "hurt").write_bytes(hurt)
    if kind.startswith("tar."):  # one checksum, behind them all
        with pytest.raises(MedclrError, match="hurt: is damaged, and nobody knows which of its files are whole"):
            unpacked(tmp_path / "hurt")
    else:
        taken, refused = unpacked(tmp_path / "hurt")
        assert refused or kind == "tar"  # in a plain tar only its headers are known to be whole
        assert len(taken) >= 15
        if kind != "tar":
            assert taken.items() < noise.items()
            assert all("damaged" in reason for reason in refused.values())

    (tmp_path / "cut").write_bytes(whole[:middle])
    if kind.startswith("zip"):
        with pytest.raises(MedclrError, match=r"cut: is damaged or incomplete \(BadZipFile\); fetch it again"):
            unpacked(tmp_path / "cut")
    else:
        taken, refused = unpacked(tmp_path / "cut")
        assert taken.items() < noise.items()
        assert len(taken) >= 15
        assert "is damaged or incomplete" in refused[""]


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_one_bit_of_a_compressed_tar_is_missed(tmp_path: Path, kind: str) -> None:
    """Deflate keeps what does not shrink as it is: nothing but the checksum at the very end tells of the bit."""
    scan = {"a/1.dcm": Random(0).randbytes(40_000)}
    hurt = bytearray(WRITERS[kind](tmp_path / "hurt", scan).read_bytes())
    hurt[len(hurt) // 2] ^= 1
    outer = write_zip(tmp_path / "outer.zip", {f"inner.{kind}": bytes(hurt), "b/2.dcm": b"2", "../x": b""})
    taken, refused = unpacked(outer)
    if kind == "tar.bz2":  # its first block shows nothing, so that it is no archive at all
        assert taken.keys() == {f"inner.{kind}", "b/2.dcm"}
    else:
        assert taken == {"b/2.dcm": b"2"}
        assert "nobody knows which of its files are whole" in refused[f"inner.{kind}"]
    assert "leads out" in refused["../x"]


def test_a_tar_that_ends_at_a_damaged_header_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a": b"1", "b": b"2", "c": b"3"})
    data = bytearray(path.read_bytes())
    data[1024] ^= 1  # the first letter of the name of b: tarfile stops there without a word
    path.write_bytes(data)
    assert unpacked(path) == ({"a": b"1"}, {"": "is damaged or incomplete (ReadError); fetch it again"})


def test_the_second_time_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "x.zip", PLAIN | {"../out": b""})
    first = unpacked(path)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "members_of", None)
        assert unpacked(path) == first

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "copies").rglob("[!.]*") if file.is_file()}
    assert set(before.values()) == {path.stat().st_mtime_ns}
    time.sleep(0.01)
    write_zip(path, {"a/1.dcm": b"ONE" * 500, "new": b"new"})  # of the same size as before: it must not pass for it
    assert unpacked(path) == ({"a/1.dcm": b"ONE" * 500, "new": b"new"}, {})
    changed = next(file for file in before if file.name == "1.dcm")
    assert changed.stat().st_mtime_ns != before[changed]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_interrupted_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    inner = write_zip(tmp_path / "inner", PLAIN).read_bytes()
    entries = {f"{i}": os.urandom(1000) for i in range(8)} | {"inner.zip": inner, "last": b"last"}
    path = WRITERS[kind](tmp_path / "x", entries)
    expected = {name: data for name, data in entries.items() if data is not inner}
    expected |= {f"inner.zip/{name}": data for name, data in PLAIN.items()}
    copies = tmp_path / "copies"
    original = archive._Unpacking._write
    written: list[str] = []

    def write(self: archive._Unpacking, member: members.Member, part: Path) -> bytes:
        written.append(member.name)
        if len(written) in (5, 12):
            part.write_bytes(b"half")
            raise KeyboardInterrupt
        return original(self, member, part)

    monkeypatch.setattr(archive._Unpacking, "_write", write)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bring(path, copies)
        assert (
            contents(copies / next(child.name for child in copies.iterdir() if child.is_dir())).items()
            <= expected.items()
        )
    assert unpacked(path) == (expected, {})
    if kind == "zip":
        assert written.count("0") == 1  # what was there was not written again


def test_a_killed_run_leaves_nothing_half(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", PLAIN)
    copies = tmp_path / "copies"
    folder = place(copies, str(path))
    (folder / "a").mkdir()
    (folder / "a" / ".part.tmp").write_bytes(b"ha")
    status = path.stat()
    (folder / ".source.json").write_text(
        f'{{"size": {status.st_size}, "mtime_ns": {status.st_mtime_ns}, "complete": false, "refused": []}}'
    )
    (folder / "a" / "2.dcm").write_bytes(b"xxx")  # of the right size, but the machine fell before it was on the disk
    assert unpacked(path) == (PLAIN, {})


# DICOMDIR


def write_disc(folder: Path) -> Path:
    """A disc with 4 slices of one patient, and a file that its DICOMDIR does not know."""
    disc = FileSet()
    for number, path in enumerate(write_series(folder.parent / "series")):
        dataset = dcmread(path)
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "120000", "1"
        dataset.SeriesNumber, dataset.InstanceNumber = 1, number
        disc.add(dataset)
    disc.write(folder)
    disc._stage["t"].cleanup()  # pydicom leaves that to the garbage collector, which warns
    (folder / "VIEWER.EXE").write_bytes(b"MZ")
    return folder / "DICOMDIR"


def test_a_dicomdir_gives_exactly_its_files(tmp_path: Path) -> None:
    path = write_disc(tmp_path / "disc")
    brought = bring(path, tmp_path / "copies")
    assert brought.folder == tmp_path / "disc"
    assert brought.files is not None
    on_disc = {
        file.relative_to(tmp_path / "disc").as_posix() for file in (tmp_path / "disc").rglob("*") if file.is_file()
    }
    assert len(brought.files) == 4
    assert set(brought.files) == on_disc - {"DICOMDIR", "VIEWER.EXE"}
    assert brought.refused == ()
    assert not (tmp_path / "copies").exists()


def test_a_dicomdir_after_a_careless_copy(tmp_path: Path) -> None:
    path = write_disc(tmp_path / "disc")
    listed = bring(path, tmp_path).files
    assert listed is not None
    for name in listed[:2]:  # lower case, and as ISO 9660 spells it
        file = tmp_path / "disc" / name
        file.rename(file.with_name(f"{file.name.lower()}.;1"))
    (tmp_path / "disc" / listed[2]).unlink()
    top = tmp_path / "disc" / listed[0].split("/")[0]
    top.rename(top.with_name(top.name.lower()))
    path = path.rename(tmp_path / "disc" / "dicomdir.bak")
    brought = bring(path, tmp_path)
    assert brought.refused == ((listed[2], "stands in the DICOMDIR but is not there"),)
    assert brought.files is not None
    assert len(brought.files) == 3
    assert all((tmp_path / "disc" / name).is_file() for name in brought.files)
    assert sum(name.endswith(".;1") for name in brought.files) == 2


def test_a_dicomdir_leads_nowhere_else(tmp_path: Path) -> None:
    path = write_disc(tmp_path / "disc")
    listed = bring(path, tmp_path).files
    assert listed is not None
    parts = listed[0].split("/")
    (tmp_path / "SECRET").write_bytes(b"")
    data = path.read_bytes()
    old, new = "\\".join(parts).encode(), b"..\\SECRET"
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new.ljust(len(old))))
    brought = bring(path, tmp_path)
    assert brought.files == listed[1:]
    assert brought.refused == (("../SECRET", "stands in the DICOMDIR with a name that leads elsewhere"),)


def test_a_broken_dicomdir(tmp_path: Path) -> None:
    path = write_disc(tmp_path / "disc")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(MedclrError, match=r"this DICOMDIR .*; give its folder instead$"):
        bring(path, tmp_path)
