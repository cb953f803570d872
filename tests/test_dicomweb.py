"""A PACS by DICOMweb, against a small server that misbehaves in every way that a network knows."""

import base64
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from pydicom import dcmread

from medclr.errors import MedclrError
from medclr.sources import Brought, bring, dicomweb, multipart, server
from tests.test_index import write_series

FIRST, SECOND = "HOSP-4711", "HOSP-0815"


class Pacs(ThreadingHTTPServer):
    """Serves the DICOM files of a folder; ``faults`` are used up, one a request whose path holds the word."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.studies: dict[str, dict[str, dict[str, bytes]]] = defaultdict(lambda: defaultdict(dict))
        self.modality: dict[str, str] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                dataset = dcmread(path)
                series = self.studies[dataset.StudyInstanceUID][dataset.SeriesInstanceUID]
                series[dataset.SOPInstanceUID] = path.read_bytes()
                self.modality[dataset.SeriesInstanceUID] = dataset.Modality
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[tuple[str, Callable[[Handler], bool]]] = []
        self.most = 1000  # answers of a search at a time, whatever the client asks for

    @property
    def address(self) -> str:
        return f"dicomweb+http://127.0.0.1:{self.server_port}/dicom-web"

    def instances(self) -> dict[str, bytes]:
        return {
            f"{study}/{series}/{uid}.dcm": data
            for study, all_series in self.studies.items()
            for series, found in all_series.items()
            for uid, data in found.items()
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Pacs
    cut_at: int | None = None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.cut_at = None
        address = urlsplit(self.path)
        self.server.asked.append(self.path)
        self.server.headers.append(dict(self.headers))
        for fault in self.server.faults:
            word, misbehave = fault
            if word in self.path:
                self.server.faults.remove(fault)
                if misbehave(self):
                    return
                break
        self.answer(address.path.removeprefix("/dicom-web").strip("/").split("/"), parse_qs(address.query))

    def answer(self, parts: list[str], query: dict[str, list[str]]) -> None:
        studies = self.server.studies
        try:
            match parts:
                case ["studies"]:
                    self.search([{"0020000D": uid} for uid in studies], query)
                case ["studies", study, "series"]:
                    found = [{"0020000E": uid, "00080060": self.server.modality[uid]} for uid in studies[study]]
                    self.search(found, query)
                case ["studies", study, "series", series, "instances"]:
                    self.search([{"00080018": uid} for uid in studies[study][series]], query)
                case ["studies", study, "series", series]:
                    self.send(list(studies[study][series].values()))
                case ["studies", study, "series", series, "instances", uid]:
                    self.send([studies[study][series][uid]])
                case _:
                    self.reply(404)
        except KeyError:
            self.reply(404)

    def search(self, found: list[dict[str, str]], query: dict[str, list[str]]) -> None:
        start, size = int(query["offset"][0]), min(int(query["limit"][0]), self.server.most)
        page = [{tag: {"vr": "UI", "Value": [text]} for tag, text in item.items()} for item in found[start:][:size]]
        self.reply(200 if page else 204, json.dumps(page).encode() if page else b"", "application/dicom+json")

    def send(self, files: list[bytes]) -> None:
        if not files:
            self.reply(404)
            return
        body = b"".join(b"--=_b 1\r\nContent-Type: application/dicom\r\n\r\n" + data + b"\r\n" for data in files)
        self.reply(200, body + b"--=_b 1--\r\n", 'multipart/related; type="application/dicom"; boundary="=_b 1"')

    def reply(self, status: int, body: bytes = b"", kind: str = "text/html", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: self.cut_at])
        if self.cut_at is not None:
            self.close_connection = True


def status(code: int, **headers: str) -> Callable[[Handler], bool]:
    def misbehave(handler: Handler) -> bool:
        handler.reply(code, b"<html>Doe^Jane is not well</html>", **headers)
        return True

    return misbehave


def drop(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def cut(at: int) -> Callable[[Handler], bool]:
    """After so many bytes of the body."""

    def misbehave(handler: Handler) -> bool:
        handler.cut_at = at
        return False

    return misbehave


def html(handler: Handler) -> bool:
    handler.reply(200, b"<html>please log in</html>")
    return True


def silent(handler: Handler) -> bool:
    threading.Event().wait(0.6)
    return drop(handler)


def no_dicom(handler: Handler) -> bool:
    handler.send([b"not DICOM" * 50])
    return True


@pytest.fixture
def pacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pacs]:
    for name in ("MEDCLR_PACS_USER", "MEDCLR_PACS_PASSWORD", "MEDCLR_PACS_TOKEN", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(server, "WAIT_SECONDS", (0.0, 0.01, 0.02))
    monkeypatch.setattr(server, "TIMEOUT_SECONDS", 0.3)
    write_series(tmp_path / "ward" / "1", FIRST)
    write_series(tmp_path / "ward" / "2", SECOND, slices=range(3))
    write_series(tmp_path / "ward" / "3", SECOND, series="2", slices=range(1))
    with Pacs(tmp_path / "ward") as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetched(brought: Brought) -> dict[str, bytes]:
    assert brought.files is None
    assert not list(brought.folder.rglob(".*"))
    return {p.relative_to(brought.folder).as_posix(): p.read_bytes() for p in brought.folder.rglob("*") if p.is_file()}


def test_everything_is_fetched_once(pacs: Pacs, tmp_path: Path) -> None:
    brought = bring(pacs.address, tmp_path / "copies")
    assert fetched(brought) == pacs.instances()
    assert brought.refused == ()
    assert brought.folder.stat().st_mode & 0o777 == 0o700
    assert str(pacs.server_port) not in str(brought.folder)
    paths = [path.split("?")[0] for path in pacs.asked]
    assert sum("/instances/" in path for path in paths) == 1  # a series of several comes in one answer
    assert "Authorization" not in {name for headers in pacs.headers for name in headers}

    pacs.asked.clear()
    again = bring(Path(pacs.address), tmp_path / "copies")  # Path takes one of the slashes away
    assert again == brought
    assert all("limit=" in path for path in pacs.asked)

    study = next(iter(pacs.studies))
    pacs.studies[study]["1.2.3"] = {"1.2.3.4": (tmp_path / "ward" / "1" / "200").read_bytes()}  # a UID that is not its
    pacs.modality["1.2.3"] = "MR"
    assert bring(pacs.address, tmp_path / "copies").refused == (
        (f"{study}/1.2.3/1.2.3.4", "cannot be fetched: the server sends something else"),
    )


@pytest.mark.parametrize("most", [1, 2, 3])
def test_searches_come_in_pages(pacs: Pacs, tmp_path: Path, most: int) -> None:
    pacs.most = most
    assert fetched(bring(pacs.address, tmp_path / "copies")) == pacs.instances()


def test_a_server_that_knows_no_pages(pacs: Pacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Handler.search
    monkeypatch.setattr(Handler, "search", lambda self, found, query: original(self, found, query | {"offset": ["0"]}))
    assert fetched(bring(pacs.address, tmp_path / "copies")) == pacs.instances()


def test_the_search_of_the_address_is_asked(pacs: Pacs, tmp_path: Path) -> None:
    bring(f"{pacs.address}/?ModalitiesInStudy=CT&PatientName=Doe^J%20*", tmp_path / "copies")
    first = urlsplit(pacs.asked[0])
    assert first.path == "/dicom-web/studies"
    expected = {"ModalitiesInStudy": ["CT"], "PatientName": ["Doe^J *"], "limit": ["500"], "offset": ["0"]}
    assert parse_qs(first.query) == expected
    assert len(list((tmp_path / "copies").iterdir())) == 1
    bring(pacs.address, tmp_path / "copies")  # another search has a folder of its own
    assert len([child for child in (tmp_path / "copies").iterdir() if child.is_dir()]) == 2


def test_series_without_images_are_not_fetched(pacs: Pacs, tmp_path: Path) -> None:
    study, series = next((study, series) for study in pacs.studies for series in pacs.studies[study])
    pacs.modality[series] = "SR"
    brought = bring(pacs.address, tmp_path / "copies")
    assert brought.refused == ((f"{study}/{series}", "is a series of SR, not of images, and was not fetched"),)
    assert fetched(brought) == {name: data for name, data in pacs.instances().items() if series not in name}


PASSING = {
    "502": status(502),
    "503, please wait": status(503, Retry_After="0"),
    "429": status(429),
    "dropped before the answer": drop,
    "cut at the start of a part": cut(60),
    "cut in the middle of a part": cut(900),
    "cut before the last boundary": cut(-6),
    "silent": silent,
}


@pytest.mark.parametrize("where", ["/studies?", "/series?", "/instances?", "/series/"])
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again(pacs: Pacs, tmp_path: Path, fault: str, where: str) -> None:
    pacs.faults = [(where, PASSING[fault])] * 2
    brought = bring(pacs.address, tmp_path / "copies")
    assert fetched(brought) == pacs.instances()
    assert brought.refused == ()
    assert not pacs.faults


def test_what_has_come_before_a_cut_is_kept(pacs: Pacs, tmp_path: Path) -> None:
    study, series, _ = next(iter(pacs.instances())).split("/")
    size = len(pacs.instances()[next(iter(pacs.instances()))])
    pacs.faults = [(f"/series/{series}", lambda handler: False)] * 2 + [(f"/series/{series}", cut(size * 5 // 2))]
    assert fetched(bring(pacs.address, tmp_path / "copies")) == pacs.instances()
    one_by_one = [path for path in pacs.asked if f"{series}/instances/" in path]
    assert len(one_by_one) == len(pacs.studies[study][series]) - 2


def test_a_server_that_goes_away_is_come_back_to(pacs: Pacs, tmp_path: Path) -> None:
    pacs.faults = [("/series/", lambda handler: False)] * 4 + [("/series/", drop)] * 20
    with pytest.raises(MedclrError, match=r"the connection fails .*; the same command goes on where this stopped$"):
        bring(pacs.address, tmp_path / "copies")
    there = {path.name for path in (tmp_path / "copies").rglob("*.dcm")}
    assert 0 < len(there) < len(pacs.instances())
    pacs.faults.clear()
    pacs.asked.clear()
    assert fetched(bring(pacs.address, tmp_path / "copies")) == pacs.instances()
    assert not {path.rpartition("/")[2] + ".dcm" for path in pacs.asked if "/instances/" in path} & there


@pytest.mark.parametrize(
    ("misbehave", "reason"),
    [
        (status(500), "the server answers with status 500, 4 times"),
        (status(404), "the server answers with status 404"),
        (cut(300), "the server's answer ends in the middle, 4 times"),
        (html, "the server sends something that is no multipart/related"),
        (no_dicom, "the server sends something that is no DICOM"),
    ],
)
def test_one_bad_instance_does_not_cost_the_others(
    pacs: Pacs, tmp_path: Path, misbehave: Callable[[Handler], bool], reason: str
) -> None:
    name = list(pacs.instances())[-1].removesuffix(".dcm")
    pacs.faults = [(f"/instances/{name.rpartition('/')[2]}", misbehave)] * 4
    brought = bring(pacs.address, tmp_path / "copies")
    assert brought.refused == ((name, f"cannot be fetched: {reason}"),)
    expected = pacs.instances()
    del expected[f"{name}.dcm"]
    assert fetched(brought) == expected
    pacs.faults.clear()
    assert fetched(bring(pacs.address, tmp_path / "copies")) == pacs.instances()  # what was refused is asked for again


def test_a_server_that_gives_nothing_is_left(pacs: Pacs, tmp_path: Path) -> None:
    pacs.faults = [("/series/", status(500))] * 1000
    with pytest.raises(MedclrError, match=r"3 times in a row it does not give what it lists, the last .* status 500"):
        bring(pacs.address, tmp_path / "copies")


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        (html, "something that is no JSON; is this the address of DICOMweb, and the search right"),
        (status(404), "status 404; is this the address of DICOMweb"),
        (status(400), "status 400; is this the address of DICOMweb, and the search right"),
        (status(401), "status 401; set the environment variables MEDCLR_PACS_USER and MEDCLR_PACS_PASSWORD"),
        (status(302, Location="http://elsewhere/?token=SECRET"), "status 302 and leads elsewhere; give the address"),
        (status(503), "status 503, 4 times"),
        (cut(10), "is broken JSON|IncompleteRead"),
    ],
)
def test_an_address_that_is_no_dicomweb(
    pacs: Pacs, tmp_path: Path, misbehave: Callable[[Handler], bool], message: str
) -> None:
    pacs.faults = [("/studies", misbehave)] * 9
    with pytest.raises(MedclrError, match=message) as caught:
        bring(f"{pacs.address}?PatientName=Doe", tmp_path / "copies")
    assert "SECRET" not in str(caught.value)
    assert "Doe" not in str(caught.value)


def test_nobody_answers(pacs: Pacs, tmp_path: Path) -> None:
    pacs.studies.clear()
    with pytest.raises(MedclrError, match="the search finds no study"):
        bring(pacs.address, tmp_path / "copies")
    with pytest.raises(MedclrError, match=r"127\.0\.0\.1:1/x: the connection fails \(Connection refused\)$"):
        bring("dicomweb+http://127.0.0.1:1/x", tmp_path / "copies")  # at once: it has never been there


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("dicomweb+https://jane:secret@pacs/x", "an address holds no user and password"),
        ("dicomweb+https:/jane:secret@pacs/x", "an address holds no user and password"),
        ("dicomweb+https://", "is no address of a PACS"),
        ("dicomweb+https://pacs:port/x", "is no address of a PACS"),
        ("dicomweb+https://pacs/x?CT", "is no address of a PACS"),
        ("dicomweb+https://pacs/x#part", "is no address of a PACS"),
        ("dicomweb+https://pacs/x?Limit=3", "limit is set by medclr"),
    ],
)
def test_wrong_addresses(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(MedclrError, match=message) as caught:
        bring(address, tmp_path / "copies")
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "copies").exists()


def test_credentials(pacs: Pacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent() -> str:
        pacs.headers.clear()
        bring(pacs.address, tmp_path / "copies")
        (value,) = {headers.get("Authorization", "") for headers in pacs.headers}
        return value

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine elsewhere login other password wrong\n")
    assert sent() == ""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login jane password n3trc\n")
    assert sent() == "Basic " + base64.b64encode(b"jane:n3trc").decode()
    monkeypatch.setenv("MEDCLR_PACS_USER", "jané")
    with pytest.raises(MedclrError, match="one is missing"):
        sent()
    monkeypatch.setenv("MEDCLR_PACS_PASSWORD", "s3cret")
    assert sent() == "Basic " + base64.b64encode("jané:s3cret".encode()).decode()
    monkeypatch.setenv("MEDCLR_PACS_TOKEN", "t0ken")
    assert sent() == "Bearer t0ken"
    for file in (tmp_path / "copies").rglob("*"):
        if file.is_file():
            assert b"s3cret" not in file.read_bytes()

    monkeypatch.undo()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("s3cret machine\n")
    with pytest.raises(MedclrError, match="cannot be read as a netrc file") as caught:
        sent()
    assert "s3cret" not in str(caught.value)


def test_a_name_out_of_the_network_is_no_path(pacs: Pacs, tmp_path: Path) -> None:
    study = next(iter(pacs.studies))
    pacs.studies[study]["../../../outside"] = {"1": b""}
    pacs.modality["../../../outside"] = "CT"
    brought = bring(pacs.address, tmp_path / "copies")
    assert brought.refused == ((study, "cannot be searched: the server gives no UID where one must stand"),)


class Trickle:
    """A body that comes in blocks of a few bytes."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size

    def read(self, size: int, /) -> bytes:
        block, self.data = self.data[: self.size], self.data[self.size :]
        return block


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_multipart_bodies(size: int) -> None:
    # RFC 2046 section 5.1.1: preamble, padding after a boundary, a part without a header, an epilogue.
    contents = [b"one\r\n--\r\n--bound\r", b"", b"\r\n\r\nthree", bytes(range(256)) * 3]
    body = b"preamble\r\n--bnd  \r\nContent-Type: application/dicom\r\n\r\n" + contents[0]
    body += b"\r\n--bnd\r\nA: b\r\nC: d\r\n\r\n" + contents[1] + b"\r\n--bnd\r\n\r\n" + contents[2]
    body += b"\r\n--bnd\r\n\r\n" + contents[3] + b"\r\n--bnd--\r\nepilogue"
    assert [b"".join(part) for part in multipart.parts(Trickle(body, size), b"bnd")] == contents
    plain = body.removeprefix(b"preamble\r\n")
    assert [b"".join(part) for part in multipart.parts(Trickle(plain, size), b"bnd")] == contents

    for end in range(0, len(body) - len(b"\r\nepilogue"), 13):
        came: list[bytes] = []
        with pytest.raises(multipart.BrokenBody, match="ends in the middle"):
            came.extend(b"".join(part) for part in multipart.parts(Trickle(body[:end], size), b"bnd"))
        assert came == contents[: len(came)]


def test_boundaries() -> None:
    assert multipart.boundary_of('multipart/related; type="application/dicom"; boundary="a b"') == b"a b"
    assert multipart.boundary_of("Multipart/Related;boundary=abc;type=x") == b"abc"
    assert multipart.boundary_of("multipart/related") is None
    assert multipart.boundary_of("text/html; boundary=abc") is None
    assert multipart.boundary_of("") is None
    endless = b"--b\r\n" + b"x" * 2**17
    with pytest.raises(multipart.BrokenBody, match="endless header"):
        list(multipart.parts(Trickle(endless, 1000), b"b"))
    assert dicomweb.NOT_IMAGES.isdisjoint({"CT", "MR", "CR", "DX", "MG", "US", "PT", "NM", "XA", "RF", "OT", "SC"})
