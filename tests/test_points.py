"""Points that two views share: the same place of the slice, whatever was cropped, turned and mirrored."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medclr.augment.points import Points, shared_points, source_matrices, to_source, to_view
from medclr.augment.views import Draws, replay
from medclr.config import ViewsConfig
from medclr.data.loader import Batch
from medclr.errors import MedclrError

N, SIDE, COUNT, DISTANCE = 40, 64, 12, 4.0
NAMES = ("MR", "XR", "US")
"""Modalities that are turned and mirrored otherwise."""
CONFIG = ViewsConfig(size_px=48, rotation_deg=40, crop_area=(0.3, 1.0))


def coordinates() -> Tensor:
    """[2,S,S]: x and y of the centre of each pixel."""
    axis = torch.arange(SIDE) + 0.5
    return torch.stack([axis.expand(SIDE, SIDE), axis[:, None].expand(SIDE, SIDE)])


def batch_of(images: Tensor, content: tuple[float, ...] = (0, 0, SIDE, SIDE)) -> Batch:
    """[n,1,S,S], the modalities taking turns."""
    n = len(images)
    zeros, whole = torch.zeros(n), torch.arange(n)
    return Batch(
        index=whole,
        images=images,
        low=zeros,
        high=zeros + SIDE,
        air=zeros,
        content=torch.tensor([content]).expand(n, 4),
        modality=whole % len(NAMES),
        scan=whole,
        patient=whole,
        slice_index=whole,
        position=zeros,
        label=torch.full((n,), -1),
        group=whole % len(NAMES),
        modalities=NAMES,
    )


def geometry(batch: Batch, draws: Draws, view: int, rows: Tensor) -> Tensor:
    """A view [n,1,s,s] with nothing but its geometry: physical values as they are."""
    drawn = tuple(
        replace(part, chain=part.chain[:1], params=part.params[:1]) for part in draws.drawn(batch, view, rows)
    )
    return replay(batch.images, drawn)


@pytest.fixture
def draws() -> Draws:
    return Draws(CONFIG, N, seed=3, step=5)


ROWS = torch.arange(N)


def shared(draws: Draws, batch: Batch | None = None) -> Points:
    return shared_points(batch or batch_of(torch.zeros(N, 1, SIDE, SIDE)), draws, ROWS, COUNT, DISTANCE)


def test_both_views_show_the_same_coordinate(draws: Draws) -> None:
    """An image whose value is its own coordinate, through the transform itself, not through the matrix under test."""
    points = shared(draws)
    assert points.exists.float().mean() > 0.9
    for axis, image in enumerate(coordinates()):
        batch = batch_of(image.expand(N, 1, SIDE, SIDE).clone())
        seen = []
        for view in (0, 1):
            made = geometry(batch, draws, view, ROWS)  # [n,1,s,s]
            at = points.at[view].float()[:, :, None]  # [n,P,1,2]
            seen.append(F.grid_sample(made, at, align_corners=False)[:, 0, :, 0][points.exists])  # [...]
        assert (seen[0] - seen[1]).abs().max() < 0.5, "half a pixel of the slice"
        for value in seen:
            assert (value - points.source[..., axis][points.exists]).abs().max() < 0.5
        assert (seen[0] - seen[1]).abs().mean() < 0.01
    turned = [part.params[0] for view in (0, 1) for part in draws.drawn(batch, view, ROWS)]
    assert any(params["flip_lr"].any() for params in turned)
    assert max(float(params["rotation_deg"].abs().max()) for params in turned) > 30


def test_points_are_apart_inside_both_views_and_in_the_content(draws: Draws) -> None:
    content = (6.0, 4.0, 40.0, 50.0)
    batch = batch_of(torch.zeros(N, 1, SIDE, SIDE), content)
    points = shared(draws, batch)
    distance = torch.cdist(points.source, points.source)  # [n,P,P]
    both = points.exists[:, :, None] & points.exists[:, None] & ~torch.eye(COUNT, dtype=torch.bool)
    assert distance[both].min() >= DISTANCE
    for at in points.at:
        assert at[points.exists].abs().max() <= 1 - 1 / CONFIG.size_px
        assert (at[~points.exists] == 0).all()
    x, y = points.source[points.exists].T
    assert 4 < x.min() < x.max() < 54
    assert 6 < y.min() < y.max() < 46
    assert x.max() - x.min() > 40, "they are spread over all of it"


def test_views_without_common_ground_have_no_points() -> None:
    batch, small = batch_of(torch.zeros(400, 1, SIDE, SIDE)), ViewsConfig(size_px=16, crop_area=(0.05, 0.1))
    draws = Draws(small, 400, seed=0, step=0)
    points = shared_points(batch, draws, torch.arange(400), 4, 2.0)
    first, second = (source_matrices(batch, draws, view, torch.arange(400)) for view in (0, 1))
    gap = (first[:, :, 2] - second[:, :, 2]).abs().amax(1)  # between the centres; no crop is wider than this
    assert (gap > 25).sum() > 50
    assert not points.exists[gap > 25].any()
    assert points.exists[gap < 3].all()


def test_points_follow_from_seed_step_and_row_alone(draws: Draws) -> None:
    batch, points = batch_of(torch.zeros(N, 1, SIDE, SIDE)), shared(draws)
    part = torch.tensor([31, 2, 7])
    again = shared_points(batch.select(part), Draws(CONFIG, N, seed=3, step=5), part, COUNT, DISTANCE)
    assert torch.equal(again.source, points.source[part])
    assert torch.equal(again.at[1], points.at[1][part])
    assert torch.equal(again.exists, points.exists[part])
    for seed, step in ((4, 5), (3, 6)):
        other = shared(Draws(CONFIG, N, seed=seed, step=step))
        assert not torch.isclose(other.source, points.source).any(-1).all(-1).any()


def test_there_and_back_again(draws: Draws) -> None:
    matrix = source_matrices(batch_of(torch.zeros(N, 1, SIDE, SIDE)), draws, 1, ROWS)
    at = torch.rand(N, 5, 2, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(to_view(matrix, to_source(matrix, at)), at)


def test_what_moves_pixels_besides_the_crop_is_refused() -> None:
    batch, rows = batch_of(torch.zeros(6, 1, SIDE, SIDE)), torch.arange(6)
    still = replace(CONFIG, chain=[{"name": "RandGaussianNoise"}])
    assert shared_points(batch, Draws(still, 6, seed=0, step=0), rows, 4, 2.0).exists.any()
    moved = replace(CONFIG, chain=[{"name": "RandGaussianNoise"}, {"name": "RandAffine", "rotate_range": 0.3}])
    with pytest.raises(MedclrError, match="RandAffine moves pixels, and points do not follow it"):
        shared_points(batch, Draws(moved, 6, seed=0, step=0), rows, 4, 2.0)
