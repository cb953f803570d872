"""Prepare in trouble: killed, out of space, not allowed to write, robbed of a source, not alone."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cohort import mixed_cohort

import medclr.data.prepare as preparing
import medclr.data.shard as sharding
from medclr.data.prepare import prepare
from medclr.data.store import Store, verify
from medclr.errors import MedclrError
from medclr.files import alone

ON_THE_LAST = 'if row.path == "xr3.png":'


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """One scan each."""
    monkeypatch.setattr(preparing, "SHARDS", 1000)
    monkeypatch.setattr(preparing, "SHARD_SLICES", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Killed

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import medclr.data.prepare as preparing
import medclr.data.shard as sharding
from medclr.errors import MedclrError

decode = sharding.decode
def tampered(row, source):
    {action}
    return decode(row, source)
sharding.decode = tampered  # in the workers too: they run this file when they start
preparing.SHARDS, preparing.SHARD_SLICES = 1000, 1

if __name__ == "__main__":
    try:
        preparing.prepare(Path(sys.argv[1]), Path(sys.argv[2]), size_px=int(sys.argv[4]), workers=int(sys.argv[3]))
    except (MedclrError, KeyboardInterrupt) as error:
        sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


def start(
    tmp_path: Path, action: str, manifest: Path, out: Path, workers: int = 2, size_px: int = 32
) -> subprocess.Popen[str]:
    """Prepare in a session of its own; ``action`` is done before each scan."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(action=action))
    command = [sys.executable, str(script), str(manifest), str(out), str(workers), str(size_px)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.usefixtures("small_shards")
def test_a_worker_that_is_killed_once_is_one_sentence(tmp_path):
    """As when memory runs out with many side by side: the scan itself can be decoded."""
    manifest, out, once = mixed_cohort(tmp_path), tmp_path / "store", tmp_path / "once"
    kill = f"(Path({str(once)!r}).touch(), os.kill(os.getpid(), signal.SIGKILL))"
    action = f"{ON_THE_LAST} Path({str(once)!r}).exists() or {kill}"
    process = start(tmp_path, action, manifest, out)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert said.strip().startswith("MedclrError: a worker process was killed, most likely because memory ran out")
    wait_for(lambda: group_is_gone(process.pid))
    prepare(manifest, out, size_px=32)
    prepare(manifest, tmp_path / "plain", size_px=32)
    assert contents(out) == contents(tmp_path / "plain")


def test_a_scan_that_kills_whoever_decodes_it_is_rejected_and_the_rest_goes_on(tmp_path):
    manifest = mixed_cohort(tmp_path)
    stores = []
    for workers, runs in ((2, [0]), (1, [-signal.SIGSEGV, 0])):  # a single process dies of it, and knows it afterwards
        out = tmp_path / f"store{workers}"
        for status in runs:
            process = start(tmp_path, f"{ON_THE_LAST} os.kill(os.getpid(), signal.SIGSEGV)", manifest, out, workers)
            _, said = process.communicate(timeout=100)
            assert process.returncode == status, said
        assert verify(out)
        stores.append(contents(out))
    rejected = (tmp_path / "store2" / "rejected.csv").read_text().splitlines()
    assert "xr3.png,ends the process that decodes it (SIGSEGV); it was tried twice" in rejected
    assert Store(tmp_path / "store2").info.n_scans == 9
    assert stores[0] == stores[1]


@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9"])
@pytest.mark.usefixtures("small_shards")
def test_interrupted_workers_leave_and_the_next_run_goes_on(tmp_path, how):
    manifest = mixed_cohort(tmp_path)
    prepare(manifest, tmp_path / "plain", size_px=32)
    out = tmp_path / "store"
    waiting = tmp_path / "waiting"
    process = start(tmp_path, f"{ON_THE_LAST} (Path({str(waiting)!r}).touch(), time.sleep(1))", manifest, out)
    wait_for(waiting.exists)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and its workers
    else:
        process.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == "kill -9" else 1)
    if how != "kill -9":
        assert said.strip() == "KeyboardInterrupt:"
        assert not list(out.glob(".*"))
    wait_for(lambda: group_is_gone(process.pid))
    assert len((out / "unfinished.jsonl").read_text().splitlines()) > 1, "some shards are done"
    prepare(manifest, out, size_px=32)
    assert contents(out) == contents(tmp_path / "plain")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("small_shards")
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path, workers, moments):
    """All processes die at once, as in a power failure; moments are spread over the time in which files are written."""
    manifest = mixed_cohort(tmp_path)
    prepare(manifest, tmp_path / "plain", size_px=24)  # so small that masks are shrunk
    assert list((tmp_path / "plain").glob("truth-*"))
    out, slowly = tmp_path / "store", "time.sleep(0.03)"

    def begin() -> subprocess.Popen[str]:
        process = start(tmp_path, slowly, manifest, out, workers, size_px=24)
        wait_for((out / "unfinished.jsonl").exists)
        return process

    process, started = begin(), time.monotonic()
    process.communicate(timeout=60)
    span = time.monotonic() - started  # from the first file to the end
    assert contents(out) == contents(tmp_path / "plain")

    rng, killed = random.Random(workers), 0
    for moment in range(moments):
        for path in out.iterdir():
            path.unlink()
        process = begin()
        time.sleep(span * (moment + rng.random()) / moments)
        killed += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        prepare(manifest, out, size_px=24)
        assert contents(out) == contents(tmp_path / "plain")
    assert killed >= moments / 3


# The disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 240 kB, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=240k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_fills_up_is_one_sentence_and_nothing_is_lost(tmp_path, small_disk, workers):
    """The store takes 180 kB; others fill the disk after it was asked for its free space."""
    manifest = mixed_cohort(tmp_path)
    prepare(manifest, tmp_path / "plain", size_px=32)
    out = small_disk / "store"
    with pytest.raises(MedclrError, match=r"the store needs 1 MB more and the disk has 0 MB"):
        prepare(manifest, out, size_px=64)
    others = small_disk / "others"
    process = start(tmp_path, f"Path({str(others)!r}).write_bytes(bytes(140_000))", manifest, out, workers)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("MedclrError: ")
    assert said.endswith(": the disk is full; free some space and run the same command again\n")
    assert not list(out.glob(".*"))
    with pytest.raises(MedclrError, match="the store is unfinished; run the same medclr prepare to go on"):
        Store(out)
    others.unlink()
    assert len((out / "unfinished.jsonl").read_text().splitlines()) > 1, "some shards are done"
    prepare(manifest, out, size_px=32)
    assert contents(out) == contents(tmp_path / "plain")


def test_a_disk_that_cannot_be_written_is_one_sentence(tmp_path, small_disk):
    manifest = mixed_cohort(tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(MedclrError, match=r"store: cannot be written \(Read-only file system\); choose another --out$"):
        prepare(manifest, small_disk / "store", size_px=8)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    manifest = mixed_cohort(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(preparing.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
        with pytest.raises(MedclrError, match=r"the store needs 0 MB more and the disk has 0 MB; make room"):
            prepare(manifest, tmp_path / "store", size_px=16)

    def full(file_number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("medclr.files.os.fsync", full)
        with pytest.raises(MedclrError, match="the disk is full; free some space and run the same command again"):
            prepare(manifest, tmp_path / "full", size_px=16)
    assert prepare(manifest, tmp_path / "store", size_px=16).n_scans == 10


# Others


def test_two_at_once_are_refused(tmp_path):
    manifest, out = mixed_cohort(tmp_path), tmp_path / "store"
    with alone(out):
        with pytest.raises(MedclrError, match="another medclr is writing there"):
            prepare(manifest, out, size_px=8)
        assert [path.name for path in out.iterdir()] == [".lock.tmp"]
    prepare(manifest, out, size_px=8)
    verify(out)
    assert not list(out.glob(".*"))


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    manifest = mixed_cohort(tmp_path)
    monkeypatch.setattr("medclr.files.fcntl.flock", refused)
    prepare(manifest, tmp_path / "store", size_px=8)
    assert verify(tmp_path / "store")


def test_whoever_comes_second_sees_what_the_first_has_done(tmp_path, monkeypatch):
    """Another prepare makes a store there between the first look and the lock."""
    manifest, out = mixed_cohort(tmp_path), tmp_path / "store"
    look = preparing._finished
    looks = []

    def late(*arguments: object) -> object:
        found = look(*arguments)
        looks.append(found)
        if len(looks) == 1:
            prepare(manifest, out, size_px=16)
        return found

    monkeypatch.setattr(preparing, "_finished", late)
    with pytest.raises(MedclrError, match=r"holds a store of mixed\.csv .* at 16 px .*, not of .* at 8 px"):
        prepare(manifest, out, size_px=8)
    assert verify(out)


@pytest.mark.usefixtures("small_shards")
def test_a_source_that_vanishes_meanwhile_stops_it_and_nothing_is_lost(tmp_path, monkeypatch):
    manifest, out = mixed_cohort(tmp_path), tmp_path / "store"
    prepare(manifest, tmp_path / "plain", size_px=32)
    lost, decode = tmp_path / "xr2.png", sharding.decode
    bytes_of_it = lost.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "decode", lambda row, source: (lost.unlink(missing_ok=True), decode(row, source))[1])
        with pytest.raises(MedclrError, match=r"xr2\.png: cannot be read \(No such file or directory\); mend that"):
            prepare(manifest, out, size_px=32)
    with pytest.raises(MedclrError, match=r"xr2\.png: cannot be read \(No such file or directory\); bring it back"):
        prepare(manifest, out, size_px=32)
    lost.write_bytes(bytes_of_it)
    prepare(manifest, out, size_px=32)
    assert contents(out) == contents(tmp_path / "plain")
