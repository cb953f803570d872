"""Features as a table: the same from embed, from load_encoder, and from a scan read by hand."""

import csv
import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import medclr
from medclr.data.store import Store
from medclr.embed import scan_means
from medclr.errors import MedclrError
from medclr.scans.privacy import Pseudonyms, load_key


@pytest.fixture(scope="module")
def run(image_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    medclr.pretrain(image_store, out, settings={"epochs": 1, "batch": 8, "views.size_px": 16, "device": "cpu"})
    return out


def read(path):
    table = pq.read_table(path).to_pydict()
    return table, np.stack([table[name] for name in table if name[0] == "f" and name[1:].isdigit()], axis=1)


def test_load_encoder_agrees_with_embed(run, image_store, tmp_path):
    medclr.embed(str(run), image_store, tmp_path / "f.parquet")
    table, features = read(tmp_path / "f.parquet")
    encoder = medclr.load_encoder(run)
    store = Store(image_store)
    for row in (0, 17, 47):
        index = next(i for i, scan in enumerate(store.scans) if scan.scan_id == table["scan_id"][row])
        x = torch.from_numpy(store.physical([index]))[:, None]  # [1,1,S,S]; one slice a scan
        low, high = store.scans[index].low, store.scans[index].high
        x = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
        with torch.inference_mode():
            expected = encoder(((x - low) / (high - low)).clamp(0, 1))
        assert features[row] == pytest.approx(expected[0].numpy(), abs=1e-5)


def test_a_scan_read_by_hand_has_the_features_of_embed(run, image_store, tmp_path):
    medclr.embed(str(run), image_store, tmp_path / "f.parquet")
    table, features = read(tmp_path / "f.parquet")
    encoder = medclr.load_encoder(run)
    key = Pseudonyms(load_key(image_store.parent / "key"))
    digest = key.content(hashlib.sha256((image_store.parent / "05.png").read_bytes()).hexdigest())
    scan_id = next(scan.scan_id for scan in Store(image_store).scans if scan.sha256 == digest)
    with torch.inference_mode():
        by_hand = encoder(medclr.read_views(image_store.parent / "05.png", encoder, modality="XR"))
    assert by_hand.numpy() == pytest.approx(features[[table["scan_id"].index(scan_id)]], abs=1e-5)


def test_a_table_holds_each_scan_once_with_its_facts(run, image_store, tmp_path):
    summary = medclr.embed(str(run), image_store, tmp_path / "f.csv", per="slice", colour="split")
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 == len({row["scan_id"] for row in rows})
    assert {row["label"] for row in rows} == {"lying", "standing"}
    assert len([name for name in rows[0] if name.startswith("f") and name[1:].isdigit()]) == 512
    assert summary.picture.stat().st_size > 0


def test_scan_means_against_a_loop():
    rng = np.random.default_rng(0)
    features, scan = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 5, 20) * 2
    means, numbers = scan_means(features, scan)
    for mean, number in zip(means, numbers, strict=True):
        assert mean == pytest.approx(features[scan == number].mean(0), abs=1e-6)


def test_random_is_the_same_twice(image_store, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        medclr.embed("random", image_store, tmp_path / name)
    assert np.array_equal(read(tmp_path / "a.parquet")[1], read(tmp_path / "b.parquet")[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"out": "f.txt"}, "use .parquet or .csv"),
        ({"colour": "lable"}, "'label'"),
        ({"encoder": "nowhere"}, "nowhere"),
        ({"weights": "w.pth"}, "--encoder imagenet"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(image_store, tmp_path, arguments, sentence):
    from pathlib import Path

    given = {"encoder": "random", "out": "f.csv", **arguments}
    weights = Path(given.pop("weights")) if "weights" in given else None
    with pytest.raises(MedclrError) as error:
        medclr.embed(given.pop("encoder"), image_store, tmp_path / given.pop("out"), weights=weights, **given)
    assert sentence in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_table_is_never_replaced(image_store, tmp_path):
    (tmp_path / "f.csv").write_text("mine")
    with pytest.raises(MedclrError, match="exists already"):
        medclr.embed("random", image_store, tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_text() == "mine"
