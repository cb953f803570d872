"""A marker stands in every text of the scans and in their names; it stands nowhere in what medclr writes and says."""

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medclr.data.manifest import read_manifest, read_rejected
from medclr.data.places import places_path
from medclr.data.rekey import ids_path
from tests.marked import NUMBER, TEXT, contents, planted, write_dicom, write_nifti, write_pictures
from tests.test_index import write_table


class Ward:
    """Scans with markers, and the commands that work on them."""

    def __init__(self, folder: Path) -> None:
        self.scans, self.masks, self.work = folder / "scans", folder / "masks", folder / "work"
        self.work.mkdir()
        write_dicom(self.scans)
        write_nifti(self.scans / f"nii {TEXT}", self.masks)
        write_pictures(self.scans / f"{TEXT}.pics")
        patients = [(f"{TEXT}_N.nii.gz", f"{TEXT}N", "well")]
        pictures = [f"{start}{TEXT}.{end}" for start in ("", "cut_") for end in ("png", "tif", "jpg")]
        patients += [(f"{TEXT}.pics/{name}", f"{TEXT}{name}", "sick") for name in pictures]
        patients += [(f"series {TEXT}{letter}", "", "well") for letter in "AB"]
        self.labels = write_table(folder / "labels.csv", ("file", "patient_id", "label"), *patients)
        self.key = folder / "secret" / "key"
        self.key.parent.mkdir(mode=0o700)
        self.key.touch(mode=0o600)
        self.key.write_text("6f" * 32)  # it puts patients of both classes into both splits
        self.said: list[bytes] = []

    def run(self, *words: str | Path, status: int = 0) -> str:
        """One command; what it says is kept."""
        command = [sys.executable, "-m", "medclr", *map(str, words)]
        environment = {**os.environ, "HOME": str(self.work), "MPLCONFIGDIR": str(self.work), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, cwd=self.work, env=environment)
        self.said += [done.stdout, done.stderr]
        assert done.returncode == status, (words, done.stderr.decode()[-2000:])
        return (done.stdout + done.stderr).decode()

    def index(self, *options: str | Path, status: int = 0, out: str = "ward.csv") -> str:
        files = ("--labels", self.labels, "--masks", self.masks, "--key-file", self.key)
        return self.run("index", self.scans, "--out", out, "--modality", "OT", *files, *options, status=status)

    def leaks(self) -> list[str]:
        """What was said or written with a marker in it."""
        leaks = [text.decode("utf-8", "replace") for text in self.said if planted(text)]
        for path in self.work.rglob("*"):
            if planted(os.fsencode(path.relative_to(self.work))) or (
                path.is_file() and any(map(planted, contents(path)))
            ):
                leaks.append(str(path.relative_to(self.work)))
        return leaks


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.mktemp("ward"))


def index_and_prepare(ward: Ward) -> None:
    """All roads through index and prepare, the erring ones too."""
    assert "of no scan" not in ward.index("--allow-unmatched", "true", "--split", "train=0.5,test=0.5")
    rows = read_manifest(ward.work / "ward.csv").rows
    assert {row.modality for row in rows} >= {"CT", "OT"}
    assert sum(bool(row.label) for row in rows) >= 6
    assert sum(bool(row.mask_path) for row in rows) == 1
    assert len(read_rejected(ward.work / "ward.csv")) > 8
    ward.index("--allow-unmatched", "true", "--split", "train=0.5,test=0.5")  # from the tables
    ward.run("rekey", "ward.csv", "--out", "new.csv", "--key-file", ward.key, "--new-key-file", f"{ward.key}2")

    assert "scans have no label" in ward.index(status=2, out="x.csv")
    strange = write_table(ward.labels.with_name("strange.csv"), ("file", "label"), (f"{TEXT}_nowhere", "x"))
    assert "of no scan" in ward.index("--labels", strange, status=2, out="x.csv")
    write_table(strange, ("patient_id", "label"), (f"{TEXT}Z", "x"))
    assert "no usable scan" in ward.index("--labels", strange, status=2, out="x.csv")
    write_table(strange, ("file", "label"), (f"{TEXT}_0", "x"))
    assert "line 2" in ward.index("--labels", strange, status=2, out="x.csv")
    stray = ward.masks / f"{TEXT}_stray.nii.gz"
    shutil.copy(ward.masks / f"{TEXT}_N.nii.gz", stray)
    assert "of no scan, the first is that of f-" in ward.index(status=2, out="x.csv")
    stray.unlink()

    prepare = ("prepare", "ward.csv", "--size-px", "32", "--key-file", ward.key, "--out")
    assert "could not be decoded" in ward.run(*prepare, "store", "--workers", "2")
    lost = ward.scans / f"{TEXT}.pics" / f"{TEXT}.png"
    lost.rename(lost.with_suffix(".away"))
    assert "cannot be read (No such file" in ward.run(*prepare, "store2", status=2)
    again = ("--allow-unmatched", "true", "--split", "train=0.5,test=0.5")
    assert "are no longer there, the first is f-" in ward.index(*again, status=2)
    lost.with_suffix(".away").rename(lost)
    os.truncate(lost, lost.stat().st_size - 1)
    assert "has changed since it was indexed" in ward.run(*prepare, "store2", status=2)
    ward.run("prepare", "ward.csv", "--out", "store3", status=2)  # without the key nobody knows where the files lie


def test_index_and_prepare_tell_nothing(ward: Ward) -> None:
    index_and_prepare(ward)
    assert ward.leaks() == []
    for secret in (places_path(ward.key), Path(f"{ward.key}2.ids.csv"), places_path(Path(f"{ward.key}2"))):
        assert secret.stat().st_mode & 0o777 == 0o600
    assert planted(places_path(ward.key).read_bytes())  # where it belongs
    assert ids_path(Path(f"{ward.key}2")).is_file()


@pytest.mark.slow
def test_the_whole_road_tells_nothing(tmp_path: Path) -> None:
    ward = Ward(tmp_path)
    index_and_prepare(ward)
    ward.run("describe", "ward.csv")
    ward.run("describe", "store")
    ward.run("dedup", "store")
    tiny = ("--epochs", "1", "--batch", "4", "--views.size_px", "24", "--monitor.sample", "4")
    ward.run("pretrain", "--store", "store", "--out", "run", "--data.split", "train", *tiny)
    of_run = ("--encoder", "run", "--store", "store")
    for road, words in (("probe", ("--budgets", "100%", "--seeds", "1")), ("embed", ("--out", "features.parquet"))):
        ward.run(road, *of_run, *words)
    ward.run("embed", *of_run, "--out", "table.csv")
    assert ward.leaks() == []
    assert len([path for path in ward.work.rglob("*") if path.is_file()]) > 30


@pytest.mark.parametrize("word", [TEXT, TEXT.lower(), NUMBER])
def test_the_search_finds_what_is_hidden(tmp_path: Path, word: str) -> None:
    def hidden(*names: str) -> Sequence[bool]:
        return [any(map(planted, contents(tmp_path / name))) for name in names]

    texts = PngInfo()
    texts.add_text("Comment", word, zip=True)
    Image.new("L", (3, 3)).save(tmp_path / "a.png", pnginfo=texts)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(word.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"x": [word] * 9}), tmp_path / "c.parquet", compression="zstd")
    (tmp_path / "d.txt").write_bytes(word.encode("utf-16"))
    (tmp_path / "e.txt").write_text("".join(f"%{byte:02X}" for byte in word.encode()))
    (tmp_path / "f.txt").write_bytes(b"plain")
    assert hidden("a.png", "b.csv.gz", "c.parquet", "d.txt", "e.txt", "f.txt") == [True] * 5 + [False]
