"""Restoration of masked images: what is hidden, what is counted, and that chunks change nothing."""

from typing import Any

import pytest
import torch
from test_augment_views import a_batch
from tiny import Tiny
from torch import Tensor, nn

from medclr.augment.views import Draws
from medclr.config import EncoderConfig, ViewsConfig
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.methods.masked import Config, Method
from medclr.step import Result, Step, plan_of
from medclr.stop import StopRequest

N, SIDE = 8, 20
VIEWS = ViewsConfig(size_px=SIDE)
WAYS: list[dict[str, Any]] = [{}, {"fill": "noise", "error": "l1"}]
ways = pytest.mark.parametrize("way", WAYS, ids=["zero l2", "noise l1"])


def make_method(**settings: Any) -> Method:
    """In float64; every norm sees each image alone."""
    torch.manual_seed(0)
    method = Method(Config(**{"patch_px": 6, "ratio": 0.5, "width": 4} | settings), Tiny())
    for parent in list(method.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(1, child.num_features))
    return method.double()


def views(method: Method) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    batch, draws, rows = a_batch(("MR", "XR"), N, 24), Draws(VIEWS, N, seed=1, step=3), torch.arange(N)
    made = [draws.view(batch, view, rows).double() for view in (0, 1)]
    return made, [tuple(x.double() for x in method.inputs(batch, draws, view, rows)) for view in (0, 1)]


@ways
def test_the_share_of_patches_that_is_hidden_is_exact_and_another_for_each_image_and_view(way: dict[str, Any]) -> None:
    _, added = views(make_method(**way))
    masks = torch.stack([mask for mask, *_ in added])  # [2,N,1,4,4]: of 20 px the last patches are cut
    assert masks.shape == (2, N, 1, 4, 4)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks.sum((3, 4)) == 8).all()
    assert len(masks.flatten(0, 1).flatten(1).unique(dim=0)) == 2 * N
    assert [len(more) for more in added] == [2 if way else 1] * 2


@ways
def test_the_error_is_that_of_the_hidden_pixels(way: dict[str, Any]) -> None:
    """Pixel by pixel, with a network that restores what it sees."""
    method = make_method(**way)
    seen: list[Tensor] = []

    class Echo(nn.Module):
        def features(self, image: Tensor, pyramid: Any) -> Tensor:
            seen.append(image)
            return image

    method.decoder = Echo()  # type: ignore[assignment]
    method.output = nn.Identity()  # type: ignore[assignment]
    (x, _), ((mask, *fill), _) = views(method)
    out = method(x, mask, *fill)
    for n in range(N):
        hidden, errors = [], []
        for row in range(SIDE):
            for column in range(SIDE):
                value = float(x[n, 0, row, column])
                if mask[n, 0, row // 6, column // 6]:
                    shown = float(fill[0][n, 0, row, column]) if fill else 0.0
                    hidden.append(value)
                    errors.append(abs(value - shown))
                else:
                    shown = value
                assert float(seen[0][n, 0, row, column]) == pytest.approx(shown, abs=1e-15)
        mean = sum(hidden) / len(hidden)
        squared = sum(error**2 for error in errors) / len(errors)
        assert out[n, 0].item() == pytest.approx(sum(errors) / len(errors) if way else squared)
        assert out[n, 1].item() == pytest.approx(squared)
        assert out[n, 2].item() == pytest.approx(sum((value - mean) ** 2 for value in hidden) / len(hidden))


@ways
def test_what_is_hidden_is_hidden_in_all_slices(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    method = Method(Config(patch_px=6, width=4, **way), Tiny(EncoderConfig(slices=3))).double().eval()
    (x, _), ((mask, *fill), _) = views(method)
    x = x.expand(-1, 3, -1, -1) * torch.tensor([0.5, 1.0, 0.8], dtype=torch.float64)[:, None, None]
    hidden = mask.repeat_interleave(6, 2).repeat_interleave(6, 3)[:, :, :SIDE, :SIDE].bool()  # [N,1,S,S]
    other = torch.where(hidden, torch.rand_like(x), x)
    pyramid = method.encoder.pyramid
    seen: list[Tensor] = []

    def spy(image: Tensor) -> list[Tensor]:
        seen.append(image)
        return pyramid(image)

    monkeypatch.setattr(method.encoder, "pyramid", spy)
    out, changed = method(x, mask, *fill), method(other, mask, *fill)  # [N,3] each
    assert torch.equal(seen[0], seen[1]), "no hidden pixel of any slice reaches the network"
    assert (out[:, 0] != changed[:, 0]).all()
    variance = [x[n, c][hidden[n, 0]].var(correction=0) for n in range(N) for c in range(3)]
    torch.testing.assert_close(out[:, 2], torch.stack(variance).view(N, 3).mean(1))


def test_restoring_the_mean_leaves_everything_unexplained() -> None:
    method = make_method()
    mean, variance = torch.rand(2, N, 1, dtype=torch.float64)
    out = torch.cat([variance, variance, variance], 1)
    loss, logs = method.objective(out, out)
    assert loss == variance.mean()
    assert logs["unexplained"] == pytest.approx(1)
    _, logs = method.objective(torch.cat([mean, 0 * mean, variance], 1), torch.cat([mean, 0 * mean, variance], 1))
    assert logs["unexplained"] == 0


def take(method: Method, chunk: int | None) -> Result:
    plan, batch = plan_of(N, chunk, Group()), a_batch(("MR", "XR"), N, 24)
    mine = batch.select(torch.from_numpy(plan.rows))
    pieces = (mine.select(torch.from_numpy(rows)) for rows in plan.pieces)
    step = Step(method, torch.optim.SGD(method.parameters(), lr=0.1), plan, Group())
    return step(pieces, Draws(VIEWS, N, seed=1, step=3), StopRequest(Group()))


def gradient(method: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@ways
@pytest.mark.parametrize("chunk", [2, 4])
def test_chunks_are_exact(way: dict[str, Any], chunk: int) -> None:
    whole, parts = make_method(**way), make_method(**way)
    expected, found = take(whole, None), take(parts, chunk)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.logs == pytest.approx(expected.logs, rel=1e-12)
    assert (gradient(parts) - gradient(whole)).norm() < 1e-12 * gradient(whole).norm()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parts.parameters())


def test_it_learns_to_restore() -> None:
    method = make_method()
    (x, _), (added, _) = views(method)
    optimizer, losses = torch.optim.Adam(method.parameters(), lr=0.01), []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = method.objective(*method(x, *added).chunk(2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_what_cannot_work_is_refused() -> None:
    for wrong in ({"ratio": 0.0}, {"ratio": 1.0}, {"patch_px": 0}, {"width": 0}):
        with pytest.raises(MedclrError, match=f"{next(iter(wrong))}: "):
            Config(**wrong)
    with pytest.raises(MedclrError, match=r"masked\.patch_px: 32 leaves one patch of a view of 20 px"):
        views(make_method(patch_px=32))
