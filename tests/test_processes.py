"""1 process with batch B, 2 with B/2, 4 with B/4: the same samples, views, losses and weights after 20 steps.

All combinations with a small network (slow), and two of them through the real loop with a ResNet.
"""

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import medclr
import medclr.look
from medclr import checkpoint
from medclr.augment.views import Draws
from medclr.cli import main
from medclr.config import ViewsConfig
from medclr.data.loader import Loader
from medclr.data.store import Store
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.files import alone
from medclr.methods.simclr import Config, Method
from medclr.optim.lars import build_optimizer, param_groups
from medclr.step import Step, plan_of
from medclr.stop import StopRequest
from medclr.track import read_metrics

CHOICES: dict[str, list[dict[str, Any]]] = {
    "head": [{"head_layers": 2}, {"head_layers": 3}],
    "loss": [{"loss": "dense"}, {"loss": "blocks"}],
    "pairs": [
        {},
        {"negatives": "other_patients"},
        {"negatives": "other_scans", "positives": "neighbouring_slice"},
        {"positives": "same_patient"},
    ],
    "chunk": [{"chunk": None}, {"chunk": 8}],
    "optimizer": [{"optimizer": "lars", "lr": 0.001}, {"optimizer": "adamw", "lr": 1e-4}],
}
GRID = [dict(itertools.chain.from_iterable(c.items() for c in combo)) for combo in itertools.product(*CHOICES.values())]
BATCH, STEPS = 16, 20

RUN = {"epochs": 1, "batch": 8, "views.size_px": 16, "encoder.width": 0.25, "encoder.stem": "imagenet",
       "device": "cpu", "monitor.sample": 8, "precision": "float64", "optim.lr": 0.02}  # fmt: skip
"""With the rate that goes with this batch, rounding grows tenfold a step: to 1.4e-10 of the loss in six."""
RUNS: list[dict[str, Any]] = [
    {},
    {"simclr.head_layers": 3, "simclr.loss": "blocks", "simclr.negatives": "other_scans",
     "simclr.positives": "same_patient", "chunk": 4},
    {"method": "dense", "dense.global_weight": 0.5, "dense.width": 4, "chunk": 4},
    {"method": "masked", "masked.fill": "noise", "masked.patch_px": 4, "masked.width": 4},
]  # fmt: skip


class TinyEncoder(nn.Module):
    """Image [B,1,H,W] -> features [B,8], with two batch norms."""

    features = 8

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.net = nn.Sequential(*first, nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))  # type: ignore[no-any-return]


def train(store: Store, chosen: dict[str, Any], dtype: torch.dtype, group: Group) -> tuple[list[float], Tensor]:
    """Losses of 20 steps, and all weights and statistics after them in one vector."""
    settings = dict(chosen)
    chunk, name, lr = settings.pop("chunk"), settings.pop("optimizer"), settings.pop("lr")
    torch.manual_seed(0)
    method = group.sync_batch_norm(Method(Config(temperature=0.5, out_features=6, **settings), TinyEncoder()).to(dtype))
    plan = plan_of(BATCH, chunk, group)
    step = Step(method, build_optimizer(name, param_groups(method, 1e-4), lr=lr), plan, group)
    loader = Loader(store, store.indices(), BATCH, 0, plan.rows, plan.pieces)
    batches = loader.epochs(0, STEPS)
    losses = [
        step(batches, Draws(ViewsConfig(size_px=12), BATCH, seed=0, step=i), StopRequest(group)).loss
        for i in range(STEPS)
    ]
    batches.close()
    return losses, torch.cat([t.double().flatten() for n, t in method.state_dict().items() if "num_batches" not in n])


def train_grid(store: Path, out: Path, precision: str) -> None:
    """What each process does: all combinations, one after the other; the first process keeps the outcomes."""
    group = Group.from_environment("cpu")
    outcomes = [train(Store(store), chosen, getattr(torch, precision), group) for chosen in GRID]
    if group.is_first:
        torch.save(outcomes, out)


def train_runs(store: Path, out: Path) -> None:
    """What each process does: the runs through the real loop."""
    for number, settings in enumerate(RUNS):
        medclr.pretrain(store, out / str(number), settings={**RUN, **settings})


def leave(store: Path, out: Path) -> None:
    """What each process does: what is refused, and what one of them is asked to leave; it notes what it said."""
    import torch.distributed as dist

    rank, words = dist.get_rank(), [f"--{key}={value}" for key, value in RUN.items()]
    outcomes: dict[str, tuple[int, str]] = {}

    def do(what: str, run: str, *more: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = main(["pretrain", "--store", str(store), "--out", str(out / run), *words, *more])
        sentences = [line for line in said.getvalue().splitlines() if line.startswith("medclr: ")]
        outcomes[what] = status, "; ".join(sentences)

    def lost(self: Store, path: Path) -> None:
        raise MedclrError(f"{path}: this node does not see it")

    do("whole", "whole")
    do("other settings", "whole", "--seed=1")
    do("busy", "busy")
    do("unknown", "new", "--data.split=nothing")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Store, "__init__", lost)
        do("one alone", "new")
    for number, (who, target, name) in enumerate(
        [(1, Method, "embed"), (1, Method, "objective"), (0, medclr.look, "plain_view")]
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(medclr.look, "PART", 4)  # of a sample of 8: it is left between two
            if rank == who:
                patch.setattr(target, name, terminated(getattr(target, name)))
            do(f"stop {number}", str(number))
        do(f"again {number}", str(number))
    (out / f"{rank}.json").write_text(json.dumps(outcomes))


def terminated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with SIGTERM to this process at its second call."""
    calls = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    return call


WORK: dict[str, Callable[..., None]] = {"grid": train_grid, "runs": train_runs, "leave": leave}


def launch(processes: int, work: str, *words: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"}
    done = subprocess.run(
        [*command, json.dumps([work, *map(str, words)])], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same(one: tuple[Sequence[float], Tensor], many: tuple[Sequence[float], Tensor], tolerance: float) -> None:
    assert many[0] == pytest.approx(one[0], rel=tolerance)
    assert (many[1] - one[1]).norm() <= tolerance * one[1].norm()


def outcome(run: Path) -> tuple[list[float], Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    state = checkpoint.load(newest)["method"]
    weights = [tensor.double().flatten() for name, tensor in state.items() if "num_batches" not in name]
    return [row["loss"] for row in read_metrics(run)], torch.cat(weights)


@pytest.mark.timeout(600)
def test_two_processes_train_as_one_through_the_real_loop(image_store: Path, tmp_path: Path) -> None:
    train_runs(image_store, tmp_path / "1")
    launch(2, "runs", image_store, tmp_path / "2")
    for number in range(len(RUNS)):
        one = outcome(tmp_path / "1" / str(number))
        assert len(one[0]) == 6
        assert_same(one, outcome(tmp_path / "2" / str(number)), 1e-10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_refuse_and_leave_as_one(image_store: Path, tmp_path: Path) -> None:
    with alone(tmp_path / "busy"):
        launch(2, "leave", image_store, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert {what: status for what, (status, _) in first.items()} == {
        what: status for what, (status, _) in second.items()
    }
    assert [said for _, said in second.values() if said] == [], "the first speaks for all"
    for what, sentence in {
        "other settings": "seed was 0 and is now 1",
        "busy": "another medclr is writing there",
        "unknown": "nothing",
        "one alone": "this node does not see it",
    }.items():
        status, said = first[what]
        assert status == 2
        assert sentence in said
        assert said.count("medclr: ") == 1
    assert not (tmp_path / "new").exists()
    for number, step in enumerate((1, 1, 6)):
        assert first[f"stop {number}"][0] == first[f"again {number}"][0] == 0
        assert f"saved step {step} of 6" in first[f"stop {number}"][1]
        assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / str(number)), 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_any_number_of_processes_trains_as_one(
    image_store: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    train_grid(image_store, tmp_path / "1.pt", precision)
    for processes in (2, 4):
        launch(processes, "grid", image_store, tmp_path / f"{processes}.pt", precision)
        outcomes = [torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, processes)]
        for chosen, one, many in zip(GRID, *outcomes, strict=True):
            print(processes, chosen)  # pytest shows it where it fails
            assert_same(one, many, tolerance)
    assert len({tuple(losses) for losses, _ in outcomes[0]}) > len(GRID) / 2, "the choices make a difference"


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    kind, where, into, *rest = json.loads(sys.argv[1])
    WORK[kind](Path(where), Path(into), *rest)
    dist.destroy_process_group()
