"""Two processes take exactly the step that one takes: gather, batch norm, loss, gradients, optimizer."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclr.distributed import Group
from medclr.methods.simclr import Config, Method
from medclr.optim.lars import LARS, param_groups

PAIRS, STEPS = 8, 3


class TinyEncoder(nn.Module):
    """Image [B,1,H,W] -> features [B,6], with two batch norms."""

    features = 6

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))  # type: ignore[no-any-return]


def train(group: Group) -> dict[str, Any]:
    """A few steps of SimCLR in float64 on this process's rows of each batch; what came out."""
    torch.manual_seed(group.rank)  # other initial weights on each rank: those of rank 0 must win
    method = Method(Config(temperature=0.1, out_features=5), TinyEncoder()).double()
    network = group.replicate(group.sync_batch_norm(method))
    optimizer = LARS(param_groups(method, 1e-4), lr=1.0)
    rows = slice(group.rank * PAIRS // group.world_size, (group.rank + 1) * PAIRS // group.world_size)
    losses, gradients = [], {}
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        a, b = torch.rand(2, PAIRS, 1, 7, 7, generator=generator, dtype=torch.float64)
        za, zb = network(torch.cat([a[rows], b[rows]])).chunk(2)
        loss, _ = method.objective(za, zb, None, group)
        optimizer.zero_grad()
        loss.backward()
        gradients[i] = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(group.mean(loss))
    method.eval()
    with torch.no_grad():
        features = method.encoder(a)  # [PAIRS,6]: of the running statistics
    return {"losses": losses, "gradients": gradients, "state": method.state_dict(), "features": features}


@pytest.mark.timeout(120)
def test_two_processes_equal_one(tmp_path: Path) -> None:
    one = train(Group())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        str(tmp_path),
    ]
    subprocess.run(command, check=True, timeout=110, env={**os.environ, "PYTHONWARNINGS": "error::FutureWarning"})
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)
    assert one["losses"][0] > 0.1
    assert all(g.abs().max() > 1e-6 for g in one["gradients"][0].values())


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    group = Group.from_environment()
    module, x = nn.BatchNorm1d(2), torch.rand(3, 2, requires_grad=True)
    assert group == Group(rank=0, world_size=1)
    assert group.all_gather(x) is x
    assert not group.mean(x).requires_grad
    assert group.replicate(group.sync_batch_norm(module)) is module
    assert group.highest(2) == 2
    assert group.from_first(b"weights") == b"weights"
    with group.unsynchronised(module):
        module(x).sum().backward()
    assert type(module) is nn.BatchNorm1d
    group.barrier()
    group.close()


def worker(out: Path) -> None:
    """What each process that the test launches does."""
    group = Group.from_environment()
    rank = torch.tensor([[float(group.rank)]])
    assert group.all_gather(rank).tolist() == [[0.0], [1.0]]
    assert group.mean(rank).item() == 0.5
    assert group.highest(3 - group.rank) == 3
    assert group.from_first(b"weights" if group.is_first else b"") == b"weights"
    assert group.from_first(b"") == b""
    torch.save(train(group), out / f"{group.rank}.pt")
    group.barrier()
    group.close()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
