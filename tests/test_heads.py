"""Heads against their formulas."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from medclr.errors import MedclrError
from medclr.models.heads import LinearHead, ProjectionHead


def normalised(x: Tensor) -> Tensor:
    """Batch norm without gamma and beta, from the definition."""
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


def randomised(layers: Literal[2, 3]) -> ProjectionHead:
    torch.manual_seed(0)
    head = ProjectionHead(features=6, layers=layers, out_features=4).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


@pytest.mark.parametrize("layers", [2, 3])
def test_projection_head_is_its_formula(layers: Literal[2, 3]) -> None:
    head, x = randomised(layers), torch.randn(10, 6, dtype=torch.float64)
    tensors = dict(head.named_parameters())
    expected, outs = x, []
    for i in range(layers - 1):
        weight, gamma, beta = (tensors[f"hidden.{i}.{name}"] for name in ("0.weight", "1.weight", "1.bias"))
        expected = (gamma * normalised(expected @ weight.T) + beta).clamp(min=0)
        outs.append(expected)
    expected = tensors["last.1.weight"] * normalised(expected @ tensors["last.0.weight"].T)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head.first(x), outs[0])
    assert len(tensors) == 3 * (layers - 1) + 2  # no bias but the betas of the hidden layers
    assert {tuple(t.shape) for name, t in tensors.items() if name.endswith("0.weight")} == {(6, 6), (4, 6)}


def test_projection_head_has_two_or_three_layers() -> None:
    with pytest.raises(MedclrError, match=r"use 2 .* or 3"):
        ProjectionHead(8, layers=4)  # type: ignore[arg-type]


def test_linear_head_starts_at_zero_and_learns() -> None:
    head = LinearHead(5, 3)
    x = torch.randn(7, 5)
    assert torch.equal(head(x), torch.zeros(7, 3))
    torch.nn.functional.cross_entropy(head(x), torch.tensor([0, 1, 2, 0, 1, 0, 0])).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0
