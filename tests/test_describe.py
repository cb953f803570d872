"""The description counts right, warns of what may harm, draws any cohort, and shows no identity."""

import csv
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import medclr
from medclr.data.cohort import read_cohort, warnings
from medclr.data.kinds import kinds
from medclr.data.manifest import FileRow, Rejected, ScanRow, write_manifest
from medclr.errors import MedclrError
from tests.cohort import mixed_cohort, save_manifest

SCAN = ScanRow("s", "p", "", "CT", "LIVER", "axial", "f", 20, 64, 64, 3.0, 0.8, 0.8, "sha")


def manifest_of(folder, rows, rejected=()):
    """A manifest of these rows, with ids and digests of their own where they are not given."""
    rows = [
        replace(row, scan_id=f"s{i}", sha256=row.sha256 if row.sha256 != "sha" else f"sha{i}")
        for i, row in enumerate(rows)
    ]
    file_rows = [FileRow(row.scan_id, "image", "/ward/Jane Doe", "x.dcm", 1, 0, "", "") for row in rows]
    return write_manifest(folder / "some.csv", rows, file_rows, rejected).path


def patients(n, **facts):
    return [replace(SCAN, patient_id=f"p{i:03d}", **facts) for i in range(n)]


def table(description, title):
    return next(table for table in description.tables if table.title == title)


def test_a_manifest_is_counted_by_modality_part_split_and_label(tmp_path):
    rows = [
        *patients(12, split="train", label="sick"),
        *patients(12, split="train", modality="MR", body_part="", n_slices=5),
        replace(
            SCAN, patient_id="p900", split="test", irregular="2 of 22 slices are missing; gantry tilt of 12.0 degrees"
        ),
        replace(SCAN, patient_id="p901", split="test", irregular="3 of 9 slices are missing"),
    ]
    rejected = [Rejected(f"f-{i}", f"is a copy of JANE_DOE{i}.dcm (same place)") for i in range(3)]
    described = medclr.describe(manifest_of(tmp_path, rows, [*rejected, Rejected("f-9", "is broken")]))
    assert described.headline == "some.csv: 340 slices of 26 scans of 14 patients"
    assert table(described, "Modality and body part").rows == [
        ("CT", "liver", 14, 14, 280, "82.4%"), ("MR", "not recorded", 12, 12, 60, "17.6%"),
    ]  # fmt: skip
    assert table(described, "Splits and labels").rows == [
        ("test", "none", 2, 2, 40), ("train", "none", 12, 12, 60), ("train", "sick", 12, 12, 240),
    ]  # fmt: skip
    assert table(described, "Irregular scans").rows == [
        ("N of N slices are missing", 2, "7.7%"), ("gantry tilt of N degrees", 1, "3.8%"),
    ]  # fmt: skip
    assert table(described, "Not used").rows == [("is a copy of … (same place)", 3, "75.0%"), ("is broken", 1, "25.0%")]
    assert ("slices a scan", 5, 5, 20, 20, 20, None) in table(described, "Sizes").rows
    assert described.page == tmp_path / "some.describe.html"
    shown = str(described) + described.page.read_text()
    assert "DOE" not in shown.upper()
    assert str(tmp_path) not in described.page.read_text()
    assert "Not known before medclr prepare" in described.page.read_text()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (patients(3), "3 patients: nearly all"),
        ([*patients(50), replace(SCAN, patient_id="p007", n_slices=900)], "One patient holds 48% of the slices"),
        ([*patients(30), replace(SCAN, patient_id="p007", modality="US", n_slices=2)], "US is 0.33% of the slices"),
        (patients(12, spacing_z_mm=9.0), "12 scans are over ten times coarser"),
        (patients(12, spacing_z_mm=None), "12 volumes are without a recorded spacing"),
        (patients(12, sha256="same"), "12 scans are byte for byte the same as one of another patient"),
        (
            [
                *patients(12, split="train"),
                *(replace(SCAN, patient_id=p, split=s, sha256="x") for p, s in ("at", "bv")),
            ],
            "2 scans are byte for byte the same as one in another split",
        ),
        (patients(12, irregular="gantry tilt of 12.0 degrees"), "100% of the scans are irregular"),
    ],
    ids=["few", "one", "rare", "coarse", "unknown", "copies", "leak", "irregular"],
)
def test_what_may_harm_is_said_in_a_sentence(tmp_path, rows, sentence):
    said = warnings(read_cohort(manifest_of(tmp_path, rows)))
    assert sum(text.startswith(sentence) for text in said) == 1, said


def test_nothing_is_said_of_a_plain_cohort(tmp_path):
    assert warnings(read_cohort(manifest_of(tmp_path, patients(20)))) == []


def test_a_patient_in_two_splits_is_a_leak_even_where_the_manifest_was_edited(tmp_path):
    path = manifest_of(tmp_path, [*patients(12, split="train"), *patients(12, split="train")])
    lines = path.read_text().splitlines()
    lines[1] = lines[1].removesuffix("train") + "test"
    path.write_text("\n".join(lines) + "\n")
    assert warnings(read_cohort(path))[0].startswith("1 patient is in more than one split")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    medclr.prepare(mixed_cohort(folder), folder / "store", size_px=96)
    return folder / "store"


def test_a_store_is_described_with_its_intensities_and_slices_and_stays_whole(store):
    before = sorted(store.iterdir())
    described = medclr.describe(store)
    assert sorted(store.iterdir()) == before
    assert described.page == store.parent / "store.describe.html"
    medclr.verify(store)
    assert [row[0] for row in table(described, "Modality and body part").rows] == ["CT", "MR", "XR"]
    intensities = {row[0]: row[1:] for row in table(described, "Intensities").rows}
    assert intensities["CT"][0] == "HU"
    assert intensities["CT"][1] < -900
    assert 1900 < intensities["CT"][4] < 2000
    html = described.page.read_text()
    assert html.count("<img") == 3
    assert "<script" not in html
    assert str(store.parent) not in html
    assert any("MR slices fill less than" in text for text in described.warnings)
    assert medclr.describe(store, out=store.parent / "again.html").page.read_text() == html
    assert medclr.describe(store, out=store.parent / "other.html", seed=1).page.read_text() != html


def test_copies_that_dedup_found_are_told(tmp_path):
    rng = np.random.default_rng(0)
    scans = []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        scans.append({"path": tmp_path / f"{i}.png", "modality": "XR"})
    scans.append({"path": tmp_path / "0.png", "modality": "XR"})
    medclr.prepare(save_manifest(tmp_path / "some.csv", scans), tmp_path / "store", size_px=40)
    assert not any("copy" in text for text in medclr.describe(tmp_path / "store").warnings)
    medclr.dedup(tmp_path / "store")
    described = medclr.describe(tmp_path / "store")
    assert [row[1] for row in table(described, "Copies").rows] == [1, 0, 1]
    assert any(text.startswith("1 slice is a copy of another patient's") for text in described.warnings)


def test_one_scan_and_very_many_are_drawn_quickly(tmp_path):
    (tmp_path / "one").mkdir()
    assert "1 slice of 1 scan of 1 patient" in str(
        medclr.describe(manifest_of(tmp_path / "one", [replace(SCAN, n_slices=1)]))
    )
    rng = np.random.default_rng(1)
    path = manifest_of(tmp_path, patients(10))
    header, first = path.read_text().splitlines()[:2]
    names, cells = header.split(","), first.split(",")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        spacing, size = rng.gamma(4, 0.3, 20_000).round(4), rng.integers(100, 700, 20_000)
        for i in range(20_000):
            row = dict(zip(names, cells, strict=True))
            row |= {"scan_id": f"s{i}", "patient_id": f"p{i // 7}", "sha256": f"{i}", "n_slices": 1 + i % 400}
            row |= {"modality": ("CT", "MR", "XR", "US", "PT")[i % 5], "spacing_z_mm": spacing[i], "rows": size[i]}
            writer.writerow(row.values())
    described = medclr.describe(path)
    assert described.headline.endswith("of 20,000 scans of 2,858 patients")
    assert described.page.stat().st_size < 400_000


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("2 of 1,200 slices are missing", "N of N slices are missing"),
        ("is a copy of IM0001 (same place)", "is a copy of … (same place)"),
        ("f-0123456789abcdef says 'SMITH'", "… says …"),
        ("cannot be decoded (scan.nii.gz)", "cannot be decoded (…)"),
        ("f-0123456789abcdef: 3 values that float32 blurs", "N values that float32 blurs"),
        ("a.dcm: 2 gaps, which --policy.missing refuse keeps out", "N gaps, which --policy.missing refuse keeps out"),
    ],
)
def test_reasons_are_told_without_what_is_particular(reason, kind):
    assert list(kinds([(reason, 1)])) == [kind]


@pytest.mark.parametrize("name", ["nothing.csv", "notes.txt", "folder"])
def test_what_is_no_cohort_is_one_sentence(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("a,b\n")
    with pytest.raises(MedclrError, match=re.escape(name)) as error:
        medclr.describe(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.html"))
