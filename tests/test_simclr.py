"""SimCLR as a method, and what every method must keep to."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclr import methods
from medclr.data.loader import load_batch
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.losses.nt_xent import nt_xent
from medclr.methods.simclr import Config, Method


class TinyEncoder(nn.Module):
    """Image [B,1,H,W] -> features [B,16]; batch norm first, so that its statistics are those of the input."""

    features = 16
    size_px = 8

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.conv = nn.Conv2d(1, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x)).relu().mean((2, 3))  # type: ignore[no-any-return]


def views(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views of each of ``n`` images: the image with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(n, 1, 8, 8, generator=generator)
    a, b = (image + 0.05 * torch.randn(n, 1, 8, 8, generator=generator) for _ in range(2))
    return a, b


def test_batch_norm_sees_both_views_at_once() -> None:
    torch.manual_seed(0)
    encoder = TinyEncoder()
    method = Method(Config(), encoder)
    a, b = views()
    method.loss(a, b + 5)
    both = torch.cat([a, b + 5])
    norm = encoder.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * both.mean().view(1))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * both.var().view(1))


def test_loss_is_nt_xent_of_the_heads_embeddings() -> None:
    torch.manual_seed(0)
    method = Method(Config(temperature=0.4, head_layers=3, out_features=7), TinyEncoder()).eval()
    a, b = views()
    loss, logs = method.loss(a, b)
    za, zb = method.head(method.encoder(a)), method.head(method.encoder(b))  # eval mode: view by view is the same
    assert za.shape == (8, 7)
    torch.testing.assert_close(loss, nt_xent(za, zb, 0.4))
    torch.testing.assert_close(logs["positive_cosine"], nn.functional.cosine_similarity(za, zb).mean())
    torch.testing.assert_close(method(a), za)


@dataclass
class Ids:
    """What SimCLR looks at of a batch: two patients of four slices, each of two scans."""

    patient: Tensor = field(default_factory=lambda: torch.arange(8) // 4)
    scan: Tensor = field(default_factory=lambda: torch.arange(8) // 2)
    slice_index: Tensor = field(default_factory=lambda: torch.arange(8) % 2)


RULES = [
    {"negatives": "other_scans"},
    {"negatives": "other_patients", "positives": "neighbouring_slice"},
    {"positives": "neighbouring_slice", "reach": 2, "loss": "blocks"},
    {"positives": "same_patient"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_settings_reach_the_loss(rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = TinyEncoder()
    method = Method(Config(**rule), encoder).eval()
    a, b = views()
    za, zb = method.embed(a)[1].detach().requires_grad_(), method.embed(b)[1].detach().requires_grad_()
    loss, _ = method.objective(za, zb, Ids())
    form = {"form": rule["loss"]} if "loss" in rule else {}
    rule = {name: value for name, value in rule.items() if name != "loss"}
    torch.testing.assert_close(loss, nt_xent(za, zb, 0.2, ids=Ids(), **rule, **form))
    torch.testing.assert_close(method.loss(a, b, Ids())[0], loss)
    assert not torch.isclose(loss, nt_xent(za, zb, 0.2))
    loss.backward()  # on leaves: for callers that embed in pieces
    assert za.grad is not None
    assert za.grad.abs().max() > 0


def test_a_batch_without_ids_is_refused_where_they_are_needed() -> None:
    method = Method(Config(positives="same_patient"), TinyEncoder())
    with pytest.raises(MedclrError, match="positives 'same_patient': needs the patient, scan and slice of each image"):
        method.loss(*views())


def test_learns_to_find_the_twin() -> None:
    torch.manual_seed(0)
    method = Method(Config(out_features=16), TinyEncoder())
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-2)
    losses = []
    for step in range(100):
        loss, _ = method.loss(*views(16, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_unknown_method_names_the_nearest() -> None:
    assert "simclr" in methods.names()
    with pytest.raises(MedclrError, match="'simclear' is unknown; the nearest known one is 'simclr'"):
        methods.get("simclear")


def test_impossible_settings_are_named() -> None:
    for wrong, named in (
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"out_features": 0}, "out_features: 0"),
        ({"reach": 0}, "reach: 0"),
    ):
        with pytest.raises(MedclrError, match=named):
            Config(**wrong)


def test_a_batch_of_a_store_brings_its_ids(image_store: Path) -> None:
    """Each patient of the store has two images; with all embeddings equal the loss counts what is compared."""
    store = Store(image_store)
    batch = load_batch(store, store.indices())
    same = torch.ones(len(batch), 4)
    for rule, compared in (({}, 95), ({"negatives": "other_patients"}, 93), ({"positives": "same_patient"}, 95)):
        loss, _ = Method(Config(**rule), TinyEncoder()).objective(same, same, batch)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(math.log(compared), abs=1e-5)
