"""Pictures for notebooks: neighbours against a slow search, and what the pictures must show, read from their pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from medclr import gallery
from medclr.config import ViewsConfig
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.figures import COLOURS
from medclr.figures_masks import COLOURS as LIGHT


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two small volumes with masks and labels."""
    from medclr.data.index import index
    from medclr.data.phantom import write_cohort
    from medclr.data.prepare import prepare

    root = tmp_path_factory.mktemp("heads")
    write_cohort(root / "scans", patients=2, size_px=40)
    (root / "key").touch(mode=0o600)
    (root / "key").write_text("00" * 32)
    scans, key = root / "scans", root / "key"
    found = index([scans / "mr"], root / "m.csv", masks=scans / "mr_masks", labels=scans / "labels.csv", key_file=key)
    assert found.scans == 2
    prepare(root / "m.csv", root / "store", size_px=24, key_file=key)
    return Store(root / "store")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """CT, MR and X-ray of three patients."""
    from medclr.data.index import index
    from medclr.data.phantom import write_cohort
    from medclr.data.prepare import prepare

    root = tmp_path_factory.mktemp("cohort")
    write_cohort(root / "scans", patients=3, size_px=40)
    (root / "key").touch(mode=0o600)
    (root / "key").write_text("00" * 32)
    index([root / "scans"], root / "m.csv", labels=root / "scans" / "labels.csv", key_file=root / "key")
    prepare(root / "m.csv", root / "store", size_px=24, key_file=root / "key")
    return Store(root / "store")


def pixels(picture: gallery.Picture) -> np.ndarray:
    """[H,W,3] in [0,1]."""
    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), dtype=float) / 255


def count(picture: gallery.Picture, colour: str, alpha: float = 1.0) -> int:
    """How many pixels are (nearly) of a colour, drawn over white with that opacity."""
    wanted = alpha * np.array(to_rgb(colour)) + 1 - alpha
    return int((abs(pixels(picture) - wanted).max(-1) < 0.08).sum())


class TestFindNeighbours:
    def slow(self, x: np.ndarray, group: np.ndarray, row: int, k: int) -> tuple[list[int], list[float]]:
        centred = x - x.mean(0)
        cosines = {}
        for other in range(len(x)):
            if group[other] != group[row]:
                a, b = centred[row], centred[other]
                cosines[other] = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        best = sorted(cosines, key=lambda i: -cosines[i])[:k]
        return best, [cosines[i] for i in best]

    @pytest.mark.parametrize("pairs_at_once", [1, 100, 2**24])
    def test_as_a_slow_search(self, pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gallery, "PAIRS_AT_ONCE", pairs_at_once)
        rng = np.random.default_rng(0)
        x, group = rng.normal(3, 1, (40, 7)), rng.integers(0, 6, 40)
        for rows in (None, [31, 2, 2]):
            found = gallery.find_neighbours(x, group, rows, k=4)
            assert found.rows.tolist() == (list(range(40)) if rows is None else rows)
            for row, nearest, cosine in zip(found.rows, found.nearest, found.cosine, strict=True):
                best, values = self.slow(x, group, int(row), 4)
                assert nearest.tolist() == best
                np.testing.assert_allclose(cosine, values, atol=1e-6)

    def test_words_are_groups_too_and_equal_rows_do_no_harm(self) -> None:
        found = gallery.find_neighbours(np.ones((4, 3)), np.array(["a", "a", "b", "b"]), k=2)
        assert found.nearest.tolist() == [[2, 3], [2, 3], [0, 1], [0, 1]]
        assert (found.cosine == 0).all()

    def test_too_many_asked_for(self) -> None:
        with pytest.raises(MedclrError, match=r"k=2: there are only 1 rows"):
            gallery.find_neighbours(np.eye(4), [0, 0, 0, 1], k=2)


class TestSample:
    def test_takes_modalities_and_patients_in_turn(self, cohort: Store) -> None:
        chosen = gallery.sample(cohort, 9)
        modality, patient = cohort.column("modality")[chosen], cohort.column("patient")[chosen]
        assert sorted({*zip(modality.tolist(), patient.tolist(), strict=True)}) == [
            (m, p) for m in range(3) for p in range(3)
        ]
        assert modality.tolist() == sorted(modality.tolist())

    def test_each_once_and_the_seed_decides(self, cohort: Store) -> None:
        everything = gallery.sample(cohort, len(cohort) + 5)
        assert sorted(everything.tolist()) == list(range(len(cohort)))
        assert gallery.sample(cohort, 6, seed=1).tolist() == gallery.sample(cohort, 6, seed=1).tolist()
        assert gallery.sample(cohort, 6, seed=1).tolist() != gallery.sample(cohort, 6, seed=2).tolist()


class TestTiles:
    def test_slices_are_shown_and_saved(self, cohort: Store, tmp_path: Path) -> None:
        picture = gallery.slices(cohort, gallery.sample(cohort, 7), columns=3)
        image = pixels(picture)
        assert image.std() > 0.1
        assert 350 < image.shape[1] < 450  # three tiles of 1.7 inches at 80 dpi
        assert image.shape[0] > image.shape[1]  # three lines of them, with captions
        assert picture._repr_png_() == picture.png
        picture.save(tmp_path / "slices.png")
        assert (tmp_path / "slices.png").read_bytes() == picture.png

    def test_caption(self, cohort: Store, heads: Store) -> None:
        image = next(i for i in range(len(cohort)) if cohort.scans[cohort.column("scan")[i]].modality == "XR")
        scan = cohort.scans[cohort.column("scan")[image]]
        assert gallery.caption(cohort, image) == f"XR, {scan.patient_id[:6]}, {scan.label}"
        assert gallery.caption(heads, 3) == f"MR, {heads.scans[0].patient_id[:6]}, slice 3, {heads.scans[0].label}"

    def test_views_are_as_many_as_asked_for_and_follow_the_seed(self, cohort: Store) -> None:
        rows, config = gallery.sample(cohort, 3), ViewsConfig(size_px=16)
        few, many = (pixels(gallery.views(cohort, rows, config, n=n)) for n in (1, 4))
        assert many.shape[1] / few.shape[1] == pytest.approx(5 / 2, rel=0.05)
        assert gallery.views(cohort, rows, config, seed=1).png == gallery.views(cohort, rows, config, seed=1).png
        assert gallery.views(cohort, rows, config, seed=1).png != gallery.views(cohort, rows, config, seed=2).png

    def test_only_other_kinds_of_neighbours_are_framed(self, heads: Store) -> None:
        label = heads.column("label")
        assert len({*label.tolist()}) == 2
        same, other = np.flatnonzero(label == label[0])[:2], np.flatnonzero(label != label[0])[:1]
        query, cosine = same[:1], np.ones((1, 1), dtype=np.float32)
        pictures = (
            gallery.neighbours(heads, gallery.Neighbours(query, n, cosine)) for n in (same[1:, None], other[:, None])
        )
        assert [count(picture, gallery.RED) > 300 for picture in pictures] == [False, True]

    def test_overlays_colour_what_the_masks_mark(self, heads: Store) -> None:
        masks = heads.masks(np.arange(len(heads)))
        bare = np.flatnonzero(~masks.any((1, 2)))[:2]
        drawn = np.argsort(-(masks > 0).sum((1, 2)))[:2]
        assert (masks[drawn] > 0).any()
        assert count(gallery.overlays(heads, bare), LIGHT[0]) == 0
        assert count(gallery.overlays(heads, drawn, names={1: "ventricles"}), LIGHT[0]) > 50  # the legend


class TestFigures:
    def test_maps_draw_each_group_in_its_colour_without_unknown_places(self) -> None:
        points = np.random.default_rng(0).normal(0, 1, (60, 2))
        groups = ["b"] * 40 + ["a"] * 20
        both = gallery.maps(points, {"group": groups})
        assert min(count(both, colour, alpha=0.75) for colour in COLOURS[:2]) > 100
        points[40:] = np.nan
        assert count(gallery.maps(points, {"group": groups}), COLOURS[1], alpha=0.75) == 0

    def test_maps_call_the_rest_other(self) -> None:
        points = np.random.default_rng(0).normal(0, 1, (90, 2))
        eight, nine = (gallery.maps(points, {"group": [str(i % n) for i in range(90)]}) for n in (8, 9))
        assert count(nine, gallery.REST, alpha=0.75) > count(eight, gallery.REST, alpha=0.75) + 100

    def test_what_is_mixed_up_is_dark_off_the_diagonal(self) -> None:
        def slope(said: list[str]) -> float:
            """Of the dark pixels: positive if they go from the upper left to the lower right."""
            image = pixels(gallery.mixed_up({"label": (["x", "x", "y"], said)}))
            down, right = (abs(image - to_rgb("#08306b")).max(-1) < 0.1).nonzero()  # the end of matplotlib's Blues
            assert len(down) > 2000
            return float(np.corrcoef(down, right)[0, 1])

        assert slope(["x", "x", "y"]) > 0.4
        assert slope(["y", "y", "x"]) < -0.4

    def test_scatter_has_a_panel_each(self) -> None:
        x = np.linspace(0, 1, 50)
        one = gallery.scatter({"a": (x, x)}, "x", "y", diagonal=True)
        two = gallery.scatter({"a": (x, x), "b": (x, 1 - x)}, "x", "y")
        assert pixels(two).shape[1] / pixels(one).shape[1] == pytest.approx(2, rel=0.2)
        assert count(two, COLOURS[1], alpha=0.5) > 50
        assert count(one, COLOURS[1], alpha=0.5) == 0

    def test_pictures_of_a_run_are_read_and_shrunk(self, tmp_path: Path) -> None:
        Image.fromarray(np.arange(200 * 1000, dtype=np.uint8).reshape(200, 1000)).save(tmp_path / "curves.png")
        assert pixels(gallery.read_picture(tmp_path / "curves.png", width_px=500)).shape == (100, 500, 3)
        with pytest.raises(MedclrError, match=r"none\.png: cannot be read as a picture"):
            gallery.read_picture(tmp_path / "none.png")
