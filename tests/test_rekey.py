"""Opaque ids lead back to files for those who hold the key, and a key can be changed."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medclr.data.index import index
from medclr.data.manifest import files_path, read_manifest, read_rejected, table_paths
from medclr.data.places import Place, add_places, find_places, places_path
from medclr.data.rekey import ids_path, rekey
from medclr.data.whereis import whereis
from medclr.errors import MedclrError
from medclr.scans.privacy import load_key
from tests.test_index import write_image, write_nifti, write_series, write_table

ID = re.compile(r"\b(?:p|st|se|s|f|k)-[0-9a-f]{16}\b|\b[0-9a-f]{64}\b")


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """A manifest with every kind of id: series, volumes with a mask, pictures, rejects, labels and splits."""
    root, key = tmp_path / "scans", tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("22" * 32)  # it puts patients into both splits
    for name in ("a", "b"):
        write_series(root / name, patient=name)
    write_nifti(root / "one.nii.gz", 1)
    write_nifti(tmp_path / "masks" / "one.nii.gz", 1)
    write_image(root / "sub-7_dx.png")
    (root / "notes.txt").write_text("x")
    labels = write_table(tmp_path / "labels.csv", ("patient_id", "label"), ("a", "sick"), ("b", "well"))
    grow(tmp_path / "ward.csv", key, labels=labels, masks=tmp_path / "masks", allow_unmatched=True)
    return tmp_path


def grow(out: Path, key: Path, **options: Any) -> Any:
    scans = key.parent / "scans"
    return index([scans], out, modality="MR", split="train=0.5,test=0.5", key_file=key, **options)


def test_nothing_links_the_tables_of_two_keys_but_the_new_one(ward: Path) -> None:
    old, out = ward / "ward.csv", ward / "new.csv"
    summary = rekey(old, out, ward / "new_key", key_file=ward / "key")
    assert summary.scans == 4
    before, after = read_manifest(old, ward / "key"), read_manifest(out, ward / "new_key")
    for suffix in (".csv", ".rejected.csv", ".index.json"):  # .files.csv stays in the ward
        ids = [set(ID.findall(path.with_suffix(suffix).read_text())) for path in (old, out)]
        assert not ids[0] & ids[1]
    assert len(ID.findall(old.read_text())) == len(ID.findall(out.read_text())) > 4 * 4

    with ids_path(ward / "new_key").open() as table:
        new_of = dict(csv.reader(table))
    by_id = {row.scan_id: row for row in after.rows}
    for row in before.rows:
        new = by_id[new_of[row.scan_id]]
        assert (new.patient_id, new.path) == (new_of[row.patient_id], new_of[row.path])
        assert (new.label, new.split, new.n_slices, new.modality) == (row.label, row.split, row.n_slices, row.modality)
        assert after.files[new.scan_id].image == before.files[row.scan_id].image
        assert after.files[new.scan_id].mask == before.files[row.scan_id].mask
    assert len({row.split for row in before.rows}) == 2
    assert [r.reason for r in read_rejected(out)] == [r.reason for r in read_rejected(old)]
    for secret in (ids_path(ward / "new_key"), places_path(ward / "new_key"), ward / "new_key"):
        assert secret.stat().st_mode & 0o777 == 0o600


def test_scans_can_be_added_under_the_new_key(ward: Path) -> None:
    out, key = ward / "new.csv", ward / "new_key"
    rekey(ward / "ward.csv", out, key, key_file=ward / "key")
    before = [path.read_bytes() for path in table_paths(out)]
    options = {"masks": ward / "masks", "labels": ward / "labels.csv", "allow_unmatched": True}
    assert grow(out, key, **options).added == 0
    assert [path.read_bytes() for path in table_paths(out)] == before
    write_series(ward / "scans" / "a2", patient="a", series="2")
    assert grow(out, key, **options).added == 1
    patient = {row.patient_id for row in read_manifest(out).rows if row.label == "sick"}
    assert len(patient) == 1  # the later scan has found its patient, and with it the split


def test_a_key_changes_to_its_own_successor_alone(ward: Path) -> None:
    old, key, new = ward / "ward.csv", ward / "key", ward / "new_key"
    rekey(old, ward / "1.csv", new, key_file=key)
    assert load_key(new).startswith(load_key(key))
    rekey(old, ward / "2.csv", new, key_file=key)  # the same again
    assert (ward / "1.csv").read_bytes() == (ward / "2.csv").read_bytes()
    rekey(ward / "1.csv", ward / "3.csv", ward / "newest", key_file=new)
    assert len(load_key(ward / "newest")) == 3 * len(load_key(key))
    for arguments, message in (
        ((old, ward / "1.csv", new, key), "exists already"),
        ((old, ward / "x.csv", key, key), "does not continue the key"),
        ((old, ward / "x.csv", ward / "newest", new), "was made with another key"),
        ((old, ward / "x.csv", new, ward / "nowhere"), "there is no such key"),
        ((old, ward / "x", new, key), r"ends in \.csv"),
    ):
        with pytest.raises(MedclrError, match=message):
            rekey(*arguments[:3], key_file=arguments[3])
    assert not (ward / "x.csv").exists()
    assert not (ward / "nowhere").exists()


def test_whereis(ward: Path) -> None:
    manifest = read_manifest(ward / "ward.csv", ward / "key")
    row = next(row for row in manifest.rows if row.label == "sick")
    asked = [row.path, row.scan_id, row.patient_id]
    found = whereis(asked, manifest=ward / "ward.csv", key_file=ward / "key").files
    assert found[row.path] == [ward / "scans" / "a"]
    assert found[row.scan_id] == found[row.patient_id] == manifest.files[row.scan_id].image
    (reject,) = read_rejected(ward / "ward.csv")
    shown = str(whereis([reject.path], key_file=ward / "key"))
    assert shown == f"{reject.path}  {ward / 'scans' / 'notes.txt'}"
    with pytest.raises(MedclrError, match="give the --manifest"):
        whereis([row.scan_id], key_file=ward / "key")
    with pytest.raises(MedclrError, match="is no id of"):
        whereis(["s-0"], manifest=ward / "ward.csv", key_file=ward / "key")
    with pytest.raises(MedclrError, match=r"does not know f-0; was the manifest made with another key \(--key-file\)"):
        whereis(["f-0"], key_file=ward / "key")


def test_a_manifest_of_another_machine_says_so(ward: Path) -> None:
    shutil.move(places_path(ward / "key"), ward / "elsewhere")
    manifest = read_manifest(ward / "ward.csv", ward / "key")  # can be read all the same
    assert len(manifest.rows) == 4
    with pytest.raises(MedclrError, match=r"does not know f-\w+; was the manifest made with another key"):
        _ = manifest.files


def test_the_table_of_places_outlives_torn_lines_and_odd_names(tmp_path: Path) -> None:
    key = tmp_path / "key"
    odd = {f"f-{i}": Place("/r", name) for i, name in enumerate(('a, "b"\nc\r', "back\\slash\\n", "\udcff", "é"))}
    add_places(key, odd)
    table = places_path(key)
    whole = table.read_bytes()
    assert find_places(key, odd) == odd
    for torn in (b'f-9,"/r', b"f-9,/r,half\\", b"\xc3"):
        table.write_bytes(whole + torn)
        assert find_places(key, odd) == odd
        with pytest.raises(MedclrError, match="does not know f-9"):
            find_places(key, ["f-9"])
        add_places(key, {"f-9": Place("/r", "whole"), **odd})
        assert table.read_bytes() == whole + b"f-9,/r,whole\n"
    table.write_bytes(whole[:5])  # torn inside its first line
    add_places(key, odd)
    assert table.read_bytes() == whole


def test_many_writers_of_one_table(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from medclr.data.places import Place, add_places\n"
        "for i in range(50): add_places(Path(sys.argv[1]), {f'f-{sys.argv[2]}{i}': Place('/r', str(i))})"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "key")]
    writers = [subprocess.Popen([*command, name], env={**os.environ}) for name in "abcd"]
    assert [writer.wait() for writer in writers] == [0] * 4
    ids = [f"f-{name}{i}" for name in "abcd" for i in range(50)]
    assert len(find_places(tmp_path / "key", ids)) == 200
    assert len(places_path(tmp_path / "key").read_text().splitlines()) == 201


def test_kept_paths(tmp_path: Path) -> None:
    write_series(tmp_path / "scans" / "a")
    (tmp_path / "scans" / "notes.txt").write_text("x")
    out = tmp_path / "kept.csv"
    grow(out, tmp_path / "key", keep_paths=True)
    (row,) = read_manifest(out).rows
    assert row.path == "a"
    assert not places_path(tmp_path / "key").exists()
    assert [r.path for r in read_rejected(out)] == [str(tmp_path / "scans" / "notes.txt")]
    assert f"{tmp_path / 'scans'},a/200," in files_path(out).read_text()
    with pytest.raises(MedclrError, match=r"was made with other keep_paths \(see kept\.index\.json\)"):
        grow(out, tmp_path / "key")
