"""`medclr index` is killed, meets a full disk or another writer: the tables are the old ones or the new, no others."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medclr import files
from medclr.data.index import index
from medclr.data.manifest import read_manifest, read_rejected, table_paths
from medclr.data.places import find_places, places_path
from medclr.errors import MedclrError
from tests.test_index import write_nifti, write_series


class Cohort:
    """Two halves of scans; the manifest of the first, and what it is to become with the second."""

    def __init__(self, folder: Path, series: int) -> None:
        self.folder, self.key, self.out = folder, folder / "key", folder / "tables" / "ward.csv"
        self.places = places_path(self.key)
        self.key.touch(mode=0o600)
        self.key.write_text("7a" * 32)
        for half in ("first", "second"):
            for number in range(series):
                write_series(folder / "scans" / half / str(number), patient=f"{half} {number}")
            write_nifti(folder / "scans" / half / "sub-01_T1w.nii.gz", len(half))
            (folder / "scans" / half / "notes.txt").write_text(half)
        write_series(folder / "scans" / "second" / "more", patient="first 0", slices=range(4, 6))  # a series that grows
        (folder / "scans" / "second").rename(folder / "later")
        self.index()
        self.before = self.tables()
        shutil.copytree(self.out.parent, folder / "halfway")
        shutil.copy(self.places, folder / "halfway.paths.csv")
        (folder / "later").rename(folder / "scans" / "second")
        self.index()
        self.after = self.tables()
        assert set(self.before) == set(self.after)
        same = {name for name, table in self.before.items() if table == self.after[name]}
        assert same == {"ward.index.json"}

    def index(self) -> None:
        index([self.folder / "scans"], self.out, key_file=self.key)

    def tables(self) -> dict[str, bytes]:
        """All files of the manifest, and none but them."""
        assert {path.name for path in self.out.parent.iterdir()} == {path.name for path in table_paths(self.out)}
        return {path.name: path.read_bytes() for path in table_paths(self.out)}

    def reset(self, halfway: bool) -> None:
        """As it was before the second run, or before the first."""
        shutil.rmtree(self.out.parent)
        self.places.unlink()
        if halfway:
            shutil.copytree(self.folder / "halfway", self.out.parent)
            shutil.copy(self.folder / "halfway.paths.csv", self.places)


def crash_at(step: int, crash: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ``crash`` instead of the step-th flush or renaming."""
    steps = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal steps
            steps += 1
            if steps == step:
                crash()
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))


@pytest.mark.parametrize("halfway", [False, True])
def test_killed_at_each_step_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfway: bool) -> None:
    cohort = Cohort(tmp_path, series=2)
    step, killed = 0, True
    while killed:
        step += 1
        cohort.reset(halfway)
        child = os.fork()
        if not child:
            crash_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
            cohort.index()
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        cohort.index()
        assert cohort.tables() == cohort.after
    assert step == 14  # four tables and that of the places are flushed; each is renamed twice; and the run that ends


@pytest.mark.parametrize("halfway", [False, True])
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfway: bool) -> None:
    cohort = Cohort(tmp_path, series=1)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(1, 14):
        cohort.reset(halfway)
        with monkeypatch.context() as patched:
            crash_at(step, full, patched)
            with pytest.raises(MedclrError, match="the disk is full; free some space and run the same command again"):
                cohort.index()
        cohort.index()
        assert cohort.tables() == cohort.after


def kill_at_random(cohort: Cohort, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    command = [sys.executable, "-m", "medclr", "index", "scans", "--out", "tables/ward.csv", "--key-file", "key"]

    def run(seconds: float | None = None) -> None:
        process = subprocess.Popen(command, cwd=cohort.folder, stdout=subprocess.DEVNULL)
        if seconds is None:
            assert process.wait() == 0
        else:
            time.sleep(seconds)
            process.kill()
            process.wait()

    cohort.reset(halfway=True)
    started = time.perf_counter()
    run()
    took = time.perf_counter() - started
    moments = random.Random(0)
    for _ in range(times):
        cohort.reset(halfway=moments.random() < 0.5)
        run(moments.uniform(0, took))
        run()
        assert cohort.tables() == cohort.after


def test_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at_random(Cohort(tmp_path, series=2), 3, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_twenty_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at_random(Cohort(tmp_path, series=60), 20, monkeypatch)


def test_an_interrupted_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = Cohort(tmp_path, series=1)
    cohort.reset(halfway=True)
    child = os.fork()
    if not child:
        crash_at(11, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        cohort.index()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(MedclrError, match="was interrupted while it wrote; run the same command again"):
        read_manifest(cohort.out)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path, series=1)
    with files.alone(cohort.out.parent, ".ward.csv.lock"):
        with pytest.raises(MedclrError, match="another medclr is writing there; wait until it is done"):
            cohort.index()
        index([cohort.folder / "scans"], cohort.out.with_name("other.csv"), key_file=cohort.key)  # its own tables


def test_a_target_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path / "scans" / "a")
    (tmp_path / "file").write_text("")
    open_file = os.open

    def read_only(path: Path, *rest: int) -> int:
        if Path(path).name == ".ward.csv.lock":
            raise OSError(errno.EROFS, "Read-only file system")
        return open_file(path, *rest)

    monkeypatch.setattr(os, "open", read_only)
    for out, reason in (
        (tmp_path / "ward.csv", "Read-only file system"),
        (tmp_path / "file" / "x.csv", "File exists"),
    ):
        with pytest.raises(MedclrError, match=rf"cannot be written \({reason}\); choose another --out"):
            index([tmp_path / "scans"], out, key_file=tmp_path / "key")


def test_a_file_that_vanishes_meanwhile_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = write_series(tmp_path / "scans" / "a")
    write_nifti(tmp_path / "scans" / "sub-01_T1w.nii")
    (tmp_path / "scans" / "loop").symlink_to(tmp_path / "scans" / "loop")
    read_bytes = Path.read_bytes

    def vanishing(path: Path) -> bytes:
        slices[0].unlink(missing_ok=True)  # the walk has seen it
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", vanishing)
    out, key = tmp_path / "ward.csv", tmp_path / "key"
    assert index([tmp_path / "scans"], out, key_file=key).scans == 2
    reasons = {find_places(key, [r.path])[r.path].path: r.reason for r in read_rejected(out)}
    assert reasons == {
        "a/200": "cannot be read (No such file or directory)",
        "loop": "cannot be opened (Too many levels of symbolic links)",
    }
