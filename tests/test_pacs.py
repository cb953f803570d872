"""A real PACS: Orthanc (Debian's packages), run by the test on loopback with its own configuration.

``make test-pacs`` installs it and runs this file.
"""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from medclr.data.index import index
from medclr.data.manifest import Manifest, read_manifest
from medclr.errors import MedclrError
from medclr.scans import read
from medclr.sources import bring, dicomweb, server
from tests.conftest import shared_data
from tests.test_index import write_series

pytestmark = pytest.mark.pacs

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "researcher", "s3cret-of-the-ward"


class Orthanc:
    """A server with an archive of its own, which survives a kill."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        folder.mkdir()
        self._configuration = folder / "orthanc.json"
        self._log = folder / "log"
        settings = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": self.port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        self._configuration.write_text(json.dumps(settings))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"dicomweb+http://127.0.0.1:{self.port}/dicom-web"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["Orthanc", str(self._configuration)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        for _ in range(300):
            assert self._process.poll() is None, self._log.read_text()
            try:
                self.request("/system")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self._log.read_text())

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def request(self, path: str, data: bytes | None = None) -> bytes:
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, f"http://127.0.0.1:{self.port}", USER, PASSWORD)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(passwords)
        )
        with opener.open(f"http://127.0.0.1:{self.port}{path}", data, timeout=60) as answer:
            return bytes(answer.read())

    def store(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.request("/instances", path.read_bytes())


@pytest.fixture
def orthanc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Orthanc]:
    assert shutil.which("Orthanc"), "Orthanc is not installed; make test-pacs does it"
    assert PLUGIN.exists(), "orthanc-dicomweb is not installed; make test-pacs does it"
    monkeypatch.setenv("MEDCLR_PACS_USER", USER)
    monkeypatch.setenv("MEDCLR_PACS_PASSWORD", PASSWORD)
    running = Orthanc(tmp_path / "orthanc")
    running.start()
    yield running
    running.kill()


def synthetic(folder: Path) -> Path:
    """Two patients with 3 series, and a series of reports."""
    write_series(folder / "1", "HOSP-4711", slices=range(30))
    write_series(folder / "2", "HOSP-0815", slices=range(5))
    write_series(folder / "3", "HOSP-0815", series="2", slices=range(1))
    for path in write_series(folder / "4", "HOSP-0815", series="3", slices=range(2)):
        dataset = dcmread(path)
        dataset.Modality = "SR"
        dataset.save_as(path)
    return folder


def mr_brain(folder: Path) -> Path:
    """Two series of each of the real patients."""
    for study in sorted(shared_data("mr_brain_dicom").iterdir()):
        for series in sorted(path for path in study.iterdir() if path.is_dir())[:2]:
            shutil.copytree(series, folder / study.name / series.name)
    return folder


def ct_abdomen(folder: Path) -> Path:
    """JPEG 2000, and nobody's: PatientID is empty. So are the UIDs, without which no PACS takes them."""
    folder.mkdir()
    for path in shared_data("ct_abdomen_dicom").iterdir():
        dataset = dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.4"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.save_as(folder / path.name)
    return folder


COHORTS = {"synthetic": synthetic, "mr_brain_dicom": mr_brain, "ct_abdomen_dicom": ct_abdomen}


def described(manifest: Manifest) -> dict[str, tuple[object, ...]]:
    """What is the same wherever the files lie."""
    return {
        row.sha256: (row.patient_id, row.study_id, row.modality, row.body_part, row.plane, row.n_slices, row.rows,
                     row.columns, row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm, row.irregular)
        for row in manifest.rows
    }  # fmt: skip


@pytest.mark.parametrize("name", COHORTS)
def test_a_pacs_gives_what_the_folder_gives(orthanc: Orthanc, tmp_path: Path, name: str) -> None:
    folder = COHORTS[name](tmp_path / "files")
    orthanc.store(folder)
    tables = {}
    for where, root in (("folder", folder), ("pacs", Path(orthanc.address))):
        index([root], tmp_path / f"{where}.csv", key_file=tmp_path / "key")
        tables[where] = read_manifest(tmp_path / f"{where}.csv", tmp_path / "key")
    assert tables["pacs"].rows
    assert described(tables["pacs"]) == described(tables["folder"])
    by_content = {row.sha256: tables["folder"].files[row.scan_id] for row in tables["folder"].rows}
    for row in tables["pacs"].rows:
        ours = read(tables["pacs"].files[row.scan_id].image, row.modality)
        expected = read(by_content[row.sha256].image, row.modality)
        np.testing.assert_array_equal(ours.voxels, expected.voxels)  # [D,H,W]
        np.testing.assert_array_equal(ours.affine, expected.affine)
    again = index([Path(orthanc.address)], tmp_path / "pacs.csv", key_file=tmp_path / "key")
    assert again.added == 0
    for path in tmp_path.glob("pacs*"):
        if path.is_file():
            text = path.read_text()
            assert PASSWORD not in text
            assert str(orthanc.port) not in text


def test_searches_and_reports(orthanc: Orthanc, tmp_path: Path) -> None:
    orthanc.store(synthetic(tmp_path / "files"))
    brought = bring(f"{orthanc.address}?PatientID=HOSP-0815", tmp_path / "copies")
    assert len(list(brought.folder.rglob("*.dcm"))) == 6
    assert [reason for _, reason in brought.refused] == ["is a series of SR, not of images, and was not fetched"]
    with pytest.raises(MedclrError, match="the search finds no study"):
        bring(f"{orthanc.address}?PatientID=NOBODY", tmp_path / "copies")


def test_wrong_credentials_and_addresses(orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MedclrError, match=r"status 404; is this the address of DICOMweb"):
        bring(f"dicomweb+http://127.0.0.1:{orthanc.port}/no-such-place", tmp_path / "copies")
    monkeypatch.setenv("MEDCLR_PACS_PASSWORD", "wr0ng")
    with pytest.raises(MedclrError, match=r"status 401; set the environment variables") as caught:
        bring(orthanc.address, tmp_path / "copies")
    assert "wr0ng" not in str(caught.value)


def test_a_server_that_is_killed_and_comes_back(
    orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in write_series(tmp_path / "files", slices=range(30)):
        dataset = dcmread(path)
        dataset.Rows = dataset.Columns = 1024  # 60 MB in all: more than lies in the buffers of a connection
        dataset.PixelData = bytes(2 * 1024 * 1024)
        dataset.save_as(path)
    orthanc.store(tmp_path / "files")
    copies = tmp_path / "copies"
    original = dicomweb._uid_of
    restart = threading.Thread(target=orthanc.start)
    came = 0

    def uid_of(path: Path) -> str:
        nonlocal came
        came += 1
        if came == 3:  # it comes back while we wait
            orthanc.kill()
            restart.start()
        if came == 10:
            restart.join()
            orthanc.kill()
        return original(path)

    monkeypatch.setattr(dicomweb, "_uid_of", uid_of)
    monkeypatch.setattr(server, "WAIT_SECONDS", (0.2, 0.5, 1.0, 2.0, 4.0))
    with pytest.raises(MedclrError, match=r"the connection fails .*; the same command goes on where this stopped$"):
        bring(orthanc.address, copies)
    there = {path: path.stat().st_mtime_ns for path in copies.rglob("*.dcm")}
    assert len(there) == 10
    orthanc.start()
    brought = bring(orthanc.address, copies)
    assert len(list(brought.folder.rglob("*.dcm"))) == came == 30
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in there.items())  # and was not fetched again
    assert brought.refused == ()
    assert not list(copies.rglob("*.tmp"))
