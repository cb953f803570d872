"""Contrast of places: the loss against a slow reference and closed forms, the method, and both split over processes."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_augment_views import a_batch
from tiny import Tiny
from torch import Tensor, nn

from medclr.augment.views import Draws
from medclr.config import ViewsConfig
from medclr.data.loader import Batch
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.losses import nt_xent as module
from medclr.losses.nt_xent import nt_xent
from medclr.losses.points import point_nt_xent
from medclr.losses.positional import positional_nt_xent
from medclr.methods.dense import Config, Method
from medclr.models.unet import UNetDecoder
from medclr.step import Result, Step, plan_of
from medclr.stop import StopRequest

FORMS = ("dense", "blocks")
RULES: list[dict[str, Any]] = [
    {"negatives": "all", "form": "dense"},
    {"negatives": "all", "form": "blocks"},
    {"negatives": "same_slice"},
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))

B, P, E = 6, 5, 4


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The views of these small batches, too, fall into several tiles, the last of them cut."""
    monkeypatch.setitem(module.TILE, "cpu", 7)


@dataclass(frozen=True)
class Slices:
    scan: Tensor
    slice_index: Tensor

    def __getitem__(self, rows: Any) -> "Slices":
        return Slices(self.scan[rows], self.slice_index[rows])


SLICES = Slices(torch.tensor([3, 3, 3, 8, 8, 1]), torch.tensor([4, 5, 7, 5, 6, 5]))


def points(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings of both views [B,P,E], places [B,P,2] in a square of 10 px, and which there are [B,P]."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, B, P, E, generator=generator, dtype=torch.float64)
    source = torch.rand(B, P, 2, generator=generator, dtype=torch.float64) * 10
    exists = torch.rand(B, P, generator=generator) < 0.7
    exists[1] = False  # the views of a slice may have nothing in common
    exists[2] = torch.arange(P) == 3
    return a, b, source, exists


def slow(rule: dict[str, Any], temperature: float, distance: float, reach: int) -> float:
    """The definition, literally, in Python floats."""
    a, b, source, exists = points()
    where = [(i, p, view) for view in (0, 1) for i in range(B) for p in range(P) if exists[i, p]]
    z = {(i, p, v): [float(x) for x in (a, b)[v][i, p]] for i, p, v in where}
    length = {key: math.sqrt(sum(x * x for x in row)) for key, row in z.items()}

    def score(i: tuple[int, ...], j: tuple[int, ...]) -> float:
        return sum(x * y for x, y in zip(z[i], z[j], strict=True)) / (length[i] * length[j]) / temperature

    def is_compared(i: tuple[int, ...], j: tuple[int, ...]) -> bool:
        if i == j:
            return False
        if i[:2] == j[:2]:
            return True
        if rule["negatives"] == "same_slice":
            return i[0] == j[0]
        is_kin = SLICES.scan[i[0]] == SLICES.scan[j[0]]
        is_kin &= abs(SLICES.slice_index[i[0]] - SLICES.slice_index[j[0]]) <= reach
        away = math.dist(source[i[0], i[1]].tolist(), source[j[0], j[1]].tolist())
        return not (bool(is_kin) and away < distance)

    total = 0.0
    for i in where:
        total += math.log(sum(math.exp(score(i, j)) for j in where if is_compared(i, j)))
        total -= score(i, (i[0], i[1], 1 - i[2]))
    return total / len(where)


@rules
@pytest.mark.parametrize(("distance", "reach"), [(0.1, 0), (4.0, 0), (4.0, 1), (20.0, 1)])
def test_equals_the_definition(rule: dict[str, Any], distance: float, reach: int) -> None:
    a, b, source, exists = points()
    loss = point_nt_xent(a, b, 0.3, source=source, exists=exists, slices=SLICES, distance=distance, reach=reach, **rule)
    assert loss.item() == pytest.approx(slow(rule, 0.3, distance, reach), abs=1e-12)


@rules
def test_equal_embeddings_give_the_log_of_what_is_compared(rule: dict[str, Any]) -> None:
    """4 slices of 3 points far apart; of the last slice one point is missing: 11 points."""
    same, source = torch.ones(4, 3, 2, dtype=torch.float64), torch.arange(24.0).view(4, 3, 2)
    exists = torch.ones(4, 3, dtype=torch.bool)
    exists[3, 0] = False
    loss = point_nt_xent(same, same, 0.1, source=source, exists=exists, **rule)
    expected = math.log(21) if rule["negatives"] == "all" else (9 * math.log(5) + 2 * math.log(3)) / 11
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@rules
def test_orthogonal_points_closed_form(rule: dict[str, Any]) -> None:
    """Each point has a direction of its own, the same in both views: log1p(n e^(-1/t)) with n others."""
    z = torch.eye(12, dtype=torch.float64).view(3, 4, 12)
    loss = point_nt_xent(z, z, 0.5, source=torch.zeros(3, 4, 2), exists=torch.ones(3, 4), **rule)
    others = 22 if rule["negatives"] == "all" else 6
    assert loss.item() == pytest.approx(math.log1p(others * math.exp(-2)), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_with_all_points_it_is_nt_xent_of_them(form: Any) -> None:
    a, b, source, _ = points()
    loss = point_nt_xent(a, b, 0.2, source=source, exists=torch.ones(B, P), form=form)
    torch.testing.assert_close(loss, nt_xent(a.flatten(0, 1), b.flatten(0, 1), 0.2))


@rules
def test_gradient(rule: dict[str, Any]) -> None:
    a, b, source, exists = points()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return point_nt_xent(a, b, 0.3, source=source, exists=exists, slices=SLICES, distance=4, reach=1, **rule)

    a.requires_grad_()
    assert torch.autograd.gradcheck(loss, (a, b.requires_grad_()), fast_mode=True)
    (gradient,) = torch.autograd.grad(loss(a, b), a)
    assert (gradient[~exists] == 0).all()
    assert gradient[exists].abs().amax(1).min() > 0 or rule["negatives"] == "same_slice"


@rules
def test_without_any_point_there_is_nothing_to_learn(rule: dict[str, Any]) -> None:
    a, b, source, exists = points()
    loss = point_nt_xent(a.requires_grad_(), b, 0.3, source=source, exists=exists & False, slices=SLICES, **rule)
    (gradient,) = torch.autograd.grad(loss, a)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_neighbours_cannot_be_told_without_their_slices() -> None:
    a, b, source, exists = points()
    with pytest.raises(MedclrError, match="needs the scan and the number of each slice, and got none"):
        point_nt_xent(a, b, 0.1, source=source, exists=exists, distance=3)


# ---- the method

N = 8
VIEWS = ViewsConfig(size_px=16, rotation_deg=20)
WAYS: list[dict[str, Any]] = [
    {},
    {"negatives": "same_slice", "level": 1},
    {"global_weight": 0.5, "loss": "blocks"},
    {"global_weight": 2.0, "global_positives": "position", "global_reach": 0.3},
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())) or "plain")


def make_method(norm: bool = True, **settings: Any) -> Method:
    """In float64; without ``norm`` every batch norm is replaced by one that sees each image alone."""
    torch.manual_seed(0)
    config = Config(**{"points": 6, "distance": 2.0, "width": 4, "out_features": 5, "global_features": 5} | settings)
    method = Method(config, Tiny())
    if not norm:
        for parent in list(method.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(1, child.num_features))
                elif isinstance(child, nn.BatchNorm1d):
                    setattr(parent, name, nn.LayerNorm(child.num_features))
    return method.double()


def batch_of() -> Batch:
    """Two patients; of the slices within 0.3 of each other two are of one group, two are of single images."""
    batch = replace(a_batch(("MR", "XR"), N, 24), group=torch.tensor([3, 1, -3, 1, 3, 1, -7, 9]))
    return replace(batch, position=torch.linspace(0, 1, N), scan=torch.arange(N) // 2, patient=torch.arange(N) // 4)


def take(method: Method, chunk: int | None, group: Group | None = None) -> Result:
    """One step."""
    group = group or Group()
    plan, batch = plan_of(N, chunk, group), batch_of()
    mine = batch.select(torch.from_numpy(plan.rows))
    pieces: Iterator[Batch] = (mine.select(torch.from_numpy(rows)) for rows in plan.pieces)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    return Step(method, optimizer, plan, group)(pieces, Draws(VIEWS, N, seed=1, step=3), StopRequest(Group()))


def gradient(method: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@ways
@pytest.mark.parametrize("chunk", [2, 4])
def test_gradient_caching_is_exact(way: dict[str, Any], chunk: int) -> None:
    whole, parts = make_method(norm=False, **way), make_method(norm=False, **way)
    expected, found = take(whole, None), take(parts, chunk)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.logs == pytest.approx(expected.logs, rel=1e-12)
    assert (gradient(parts) - gradient(whole)).norm() < 1e-12 * gradient(whole).norm()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parts.parameters())


def test_the_loss_is_that_of_the_points_and_of_the_slices() -> None:
    settings: dict[str, Any] = {**WAYS[3], "temperature": 0.3}
    method, batch = make_method(**settings).eval(), batch_of()
    draws, rows = Draws(VIEWS, N, seed=1, step=3), torch.arange(N)
    views = [draws.view(batch, view, rows).double() for view in (0, 1)]
    added = [tuple(x.double() for x in method.inputs(batch, draws, view, rows)) for view in (0, 1)]
    loss, logs = method.loss(views[0], views[1], batch, None, (added[0], added[1]))
    local, whole = [], []
    for view in (0, 1):
        maps = method.encoder.pyramid(views[view])
        dense = method.decoder(views[view], maps)  # without outputs: [N,4,16,16]
        assert dense.shape == (N, 4, 16, 16)
        (at,) = added[view]
        sampled = nn.functional.grid_sample(dense, at[:, :, None, :2], padding_mode="border", align_corners=False)
        local.append(method.local(sampled[..., 0].mT.reshape(-1, 4)).view(N, 6, 5))
        assert method.head is not None
        whole.append(method.head(maps[-1].mean((2, 3))))
    here = added[0][0]
    points_loss = point_nt_xent(
        *local, 0.3, source=here[:, :, 2:4], exists=here[:, :, 4], slices=batch, distance=2.0, reach=1
    )
    slices_loss = positional_nt_xent(*whole, 0.3, places=batch, reach=0.3)
    torch.testing.assert_close(loss, points_loss + 2 * slices_loss)
    torch.testing.assert_close(logs["local_loss"] + 2 * logs["global_loss"], loss.detach())
    assert logs["points"] == here[:, :, 4].sum() / N


def test_matched_features_of_an_image_of_coordinates_are_the_same_coordinate() -> None:
    """The whole way, with a network that hands on what it sees: views, points, sampling, and the order of all of it.

    The image's value is x, then y, scaled to [0,1] as views are; with nothing but geometry drawn besides.
    """
    side, count = 48, 12
    config = ViewsConfig(size_px=48, rotation_deg=35, crop_area=(0.4, 1.0), strength=0, noise=0, blur=0, cutout=0)
    axis = torch.arange(side) + 0.5
    method = Method(Config(points=count, distance=3.0, width=1, out_features=1), Tiny())

    class Seen(UNetDecoder):
        def features(self, image: Tensor, pyramid: Any) -> Tensor:
            return image

    method.decoder.__class__ = Seen
    method.local = nn.Identity()  # type: ignore[assignment]
    rows, pixels = torch.arange(20), []
    for image in (axis.expand(side, side), axis[:, None].expand(side, side)):
        batch = a_batch(("XR", "MR"), 20, side)
        images, high = image.expand(20, 1, side, side).clone(), torch.full((20,), float(side))
        batch, draws = replace(batch, images=images, low=0 * high, high=high), Draws(config, 20, seed=0, step=0)
        added = [method.inputs(batch, draws, view, rows) for view in (0, 1)]
        views = [draws.view(batch, view, rows) for view in (0, 1)]
        a, b = (method(x, *more).view(20, count, 4) for x, more in zip(views, added, strict=True))
        there = a[:, :, 3] > 0
        assert there.float().mean() > 0.9
        assert torch.equal(a[:, :, 1:], b[:, :, 1:])
        pixels.append((a[:, :, 0] - b[:, :, 0])[there] * side)
    assert torch.stack(pixels).abs().max() < 0.5, "half a pixel"
    crops = [part.params[0] for view in (0, 1) for part in draws.drawn(batch, view, rows)]
    assert any(crop["flip_lr"].any() for crop in crops)
    assert max(float(crop["rotation_deg"].abs().max()) for crop in crops) > 30


def test_a_frozen_encoder_stays_as_it_is() -> None:
    method = make_method(frozen=True)
    before = deepcopy(method.state_dict())
    take(method, None)
    for name, tensor in method.state_dict().items():
        is_same = torch.equal(tensor, before[name])
        assert is_same == name.startswith("encoder."), name


def test_what_a_level_leaves_out_is_not_there() -> None:
    method = make_method(level=2)
    names = {name.split(".")[1] for name in method.decoder.state_dict() if name.startswith("levels.")}
    assert names == {"2", "3", "4"}
    assert not any("head" in name for name in method.decoder.state_dict())
    take(method, None)
    assert all(p.grad is not None for p in method.parameters())


def test_wrong_settings_are_named_together() -> None:
    with pytest.raises(MedclrError, match=r"dense\.points must be at least 2.*; dense\.distance must be above 0"):
        Config(points=1, distance=0)
    with pytest.raises(MedclrError, match=r"dense\.frozen must be false with a global_weight"):
        Config(frozen=True, global_weight=1)


# ---- several processes


def every_loss(group: Group) -> dict[str, Any]:
    """Loss of all processes and gradient of this one's embeddings, for each rule; and steps of the method."""
    rows = slice(group.rank * B // group.world_size, (group.rank + 1) * B // group.world_size)
    results: dict[str, Any] = {}
    for number, rule in enumerate(RULES):
        a, b, source, exists = points()
        a, b = (x[rows].clone().requires_grad_() for x in (a, b))
        kin = {"slices": SLICES[rows], "distance": 4.0, "reach": 1}
        loss = point_nt_xent(a, b, 0.2, group, source=source[rows], exists=exists[rows], **kin, **rule)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(loss / group.world_size, (a, b))
        results[f"loss {number}"] = (group.mean(loss), *gradients)
    for number, way in enumerate(WAYS):
        for chunk in (None, 4):
            method = group.sync_batch_norm(make_method(**way))
            result = take(method, chunk, group)
            weights = [t.flatten().double() for name, t in method.state_dict().items() if "num_batches" not in name]
            results[f"step {number} {chunk}"] = torch.tensor(result.loss, dtype=torch.float64), torch.cat(weights)
    return results


@pytest.mark.timeout(300)
def test_real_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], check=True, timeout=280, env=environment)
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (loss, *tensors) in every_loss(Group()).items():
        for rank in range(2):
            torch.testing.assert_close(two[rank][name][0], loss, rtol=1e-12, atol=1e-12)
        pairs = zip(two[0][name][1:], two[1][name][1:], strict=True)
        found = [torch.cat(pair) if name.startswith("loss") else pair[0] for pair in pairs]
        torch.testing.assert_close(found, tensors, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    process = Group.from_environment("cpu")
    module.TILE["cpu"] = 7
    torch.save(every_loss(process), Path(sys.argv[1]) / f"{process.rank}.pt")
    process.close()
