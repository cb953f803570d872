"""Heads on an encoder. Letters: B images, F features of the encoder, K outputs."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from medclr.errors import MedclrError


class ProjectionHead(nn.Module):
    """Features [B,F] -> embedding [B,K] in which the contrastive loss is taken.

    SimCLR v1 has 2 layers (arXiv 2002.05709, section 2.1), v2 has 3 (arXiv 2006.10029, section 2). All but the last are
    Linear, batch norm, ReLU of width F; the last is Linear and batch norm with gamma but without beta. No Linear has a
    bias. Weights start from a normal distribution of deviation 0.01, as in the reference code.

    Raises:
        MedclrError: layers is neither 2 nor 3.
    """

    def __init__(self, features: int, layers: Literal[2, 3] = 2, out_features: int = 128) -> None:
        super().__init__()
        self.shape = {"layers": layers, "features": features, "out_features": out_features}
        if layers not in (2, 3):
            raise MedclrError(f"head_layers: {layers} is not a SimCLR head; use 2 (SimCLR) or 3 (SimCLRv2)")
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU(inplace=True))
            for _ in range(layers - 1)
        )
        self.last = nn.Sequential(nn.Linear(features, out_features, bias=False), nn.BatchNorm1d(out_features))
        self.last[1].register_parameter("bias", None)  # gamma without beta
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)

    def description(self) -> dict[str, Any]:
        """What encoder.json says of it: its arguments."""
        return dict(self.shape)

    def first(self, x: Tensor) -> Tensor:
        """Features [B,F] -> output [B,F] of the first layer after its ReLU: where SimCLRv2 fine-tunes from."""
        out: Tensor = self.hidden[0](x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Features [B,F] -> embedding [B,K], not yet normalised."""
        for layer in self.hidden:
            x = layer(x)  # [B,F]
        out: Tensor = self.last(x)  # [B,K]
        return out


class LinearHead(nn.Linear):
    """Features [B,F] -> class logits [B,K]; starts at zero, so that every class begins equally likely."""

    def reset_parameters(self) -> None:
        """Zero weights and bias, as in the reference's linear evaluation."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
