"""Two nodes against one process: the same weights, and what travels between them.

Makes two network namespaces that a veth pair joins, as a cable would join two machines; each runs its own torchrun
agent, which meet at the first node's address. Needs root (it makes the namespaces, and removes them again).

    sudo python benchmarks/two_nodes.py --store STORE [--settings KEY=VALUE ...]

Exits with status 1 if losses or weights differ by more than 1e-10.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from medclr import checkpoint
from medclr.track import read_metrics

NODES = ("medclr-0", "medclr-1")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
PORT = 29411
LONGEST_S = 3600
LIMIT = 1e-10
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SETTINGS = ("epochs=2", "batch=16", "views.size_px=32", "device=cpu", "precision=float64", "monitor.sample=16")


def ip(*words: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def two_namespaces() -> Iterator[None]:
    """Two machines on one cable; removed whatever happens."""
    try:
        for node in NODES:
            ip("netns", "add", node)
        ends = [("veth-medclr-0", "netns", NODES[0]), ("veth-medclr-1", "netns", NODES[1])]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", f"veth-medclr-{number}")
            for device in (f"veth-medclr-{number}", "lo"):
                ip("-n", node, "link", "set", device, "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False, stderr=subprocess.DEVNULL)


def sent_bytes(number: int) -> int:
    """What has left a node so far."""
    path = f"/sys/class/net/veth-medclr-{number}/statistics/tx_bytes"
    return int(
        subprocess.run(["ip", "netns", "exec", NODES[number], "cat", path], check=True, capture_output=True).stdout
    )


def train_on_two(words: list[str]) -> int:
    """Run on both nodes; the bytes that left the first one."""
    running = []
    for number, node in enumerate(NODES):
        agent = [
            "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", "--rdzv-id=medclr",
            f"--local-addr={ADDRESSES[number]}",
            f"--rdzv-conf=is_host={int(number == 0)}",  # both have the host name of the machine they are on
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"veth-medclr-{number}"}
        command = ["ip", "netns", "exec", node, sys.executable, *agent, "-m", "medclr", "pretrain", *words]
        running.append(subprocess.Popen(command, env=environment))
    before = sent_bytes(0)
    try:
        codes = [process.wait(LONGEST_S) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(codes):
        raise SystemExit(f"the nodes ended with {codes}")
    return sent_bytes(0) - before


def tensors(run: Path) -> tuple[torch.Tensor, int]:
    """All weights and statistics of a run in one vector, and the bytes of the weights alone."""
    newest = checkpoint.latest(run)
    assert newest is not None
    state = checkpoint.load(newest)["method"]
    of_weights = [t.nbytes for name, t in state.items() if not name.endswith(STATISTICS)]
    return torch.cat([tensor.double().flatten() for tensor in state.values()]), sum(of_weights)


def main() -> int:
    """Train on one and on two, and compare; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--settings", nargs="*", default=[])
    options = parser.parse_args()
    settings = [f"--{setting}" for setting in (*SETTINGS, *options.settings)]
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        start = ["--store", str(options.store), *settings, "--out"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "medclr", "pretrain", *start, str(one)], check=True, env=environment)
        with two_namespaces():
            sent = train_on_two([*start, str(two)])
        (a, of_weights), (b, _) = tensors(one), tensors(two)
        steps = len(read_metrics(one))
        losses = [[row["loss"] for row in read_metrics(run)] for run in (one, two)]
        gap = max(abs(x - y) for x, y in zip(*losses, strict=True))
        share = float((a - b).norm() / a.norm())
        print(f"{steps} steps; losses differ by at most {gap:.2e}, weights by {share:.2e} of their norm")
        predicted = of_weights * (steps + 1) / steps  # gradients in a ring of two: as much as they hold; weights once
        print(
            f"{sent / steps / 1e6:.1f} MB a step left the first node; {predicted / 1e6:.1f} expected of weights alone"
        )
        return int(gap > LIMIT or share > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
