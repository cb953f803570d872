"""A PACS by DICOMweb (PS3.18): search the studies, QIDO-RS, and fetch what is missing of them, WADO-RS.

``dicomweb+https://host:port/path?ModalitiesInStudy=CT&StudyDate=20200101-20201231``: after the question mark stand
the search's own words (PS3.18 section 8.3.4). Each instance becomes ``study/series/instance.dcm``, named by the UIDs,
as the server stores it; those that are there already are not asked for again.
"""

import http.client
import json
import re
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from pydicom import dcmread

from medclr import files
from medclr.errors import MedclrError
from medclr.progress import Advance, progress
from medclr.scans.dicom_values import unheard
from medclr.sources import Brought, place
from medclr.sources.multipart import BrokenBody, boundary_of, parts
from medclr.sources.server import CREDENTIALS, Refused, Server

PAGE = 500
"""So many answers of a search at a time."""

_REPORTS = ("SR", "DOC", "KO", "PR", "AU", "ECG", "EPS", "HD", "RESP")
_RESULTS = ("SEG", "REG", "FID", "RWV", "PLAN", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "RTINTENT")
NOT_IMAGES = frozenset((*_REPORTS, *_RESULTS))
"""Modality (PS3.3 C.7.3.1.1.1) of series that hold no images of patients; they are not fetched."""

FAILURES = 3
"""So many instances in a row that the server does not give, and it is the server."""

_STUDY, _SERIES, _INSTANCE, _MODALITY = "0020000D", "0020000E", "00080018", "00080060"
_JSON = "application/dicom+json"
_DICOM = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # as stored
_JSON_BYTES = 2**28
_INCOMING = ".incoming.tmp"


def is_dicomweb(root: str | Path) -> bool:
    """Whether ``root`` is an address, also one that went through ``Path``, which takes one of its slashes."""
    return re.match(r"dicomweb\+https?:", str(root), re.IGNORECASE) is not None


def bring(root: str | Path, copies: Path) -> Brought:
    """Fetch what the search ``root`` finds and is not among the ``copies`` yet.

    Raises:
        MedclrError: the address is wrong, the server does not answer or does not let us in, or the disk is full.
    """
    address, query = _address(str(root))
    folder = place(copies, f"dicomweb {address.geturl()}?{urlencode(query)}")
    with closing(Server(address)) as server, files.alone(folder):
        refused = _fetch_all(server, query, folder)
    return Brought(folder, refused=tuple(refused))


def _address(root: str) -> tuple[SplitResult, list[tuple[str, str]]]:
    """Address without its query, and the query."""
    text = re.sub(r"^dicomweb\+(https?):/*", lambda match: f"{match[1].lower()}://", root, flags=re.IGNORECASE)
    try:
        parsed = urlsplit(text)
        known = bool(parsed.hostname) and parsed.port != 0
        query = parse_qsl(parsed.query, keep_blank_values=True, strict_parsing=bool(parsed.query))
    except ValueError:
        known = False
    if "@" in text.split("?")[0]:
        raise MedclrError(f"dicomweb+...: an address holds no user and password, others would see them; {CREDENTIALS}")
    if not known or parsed.fragment:
        raise MedclrError(f"{root}: is no address of a PACS; write it as dicomweb+https://host:port/path?key=value")
    if reserved := {"limit", "offset"} & {key.lower() for key, _ in query}:
        raise MedclrError(f"{root}: {min(reserved)} is set by medclr; take it out")
    return parsed._replace(query="", fragment="", path=parsed.path.rstrip("/")), query


def _fetch_all(server: Server, query: list[tuple[str, str]], folder: Path) -> list[tuple[str, str]]:
    """Fetch all studies; returns (name, reason) of what could not be."""
    try:
        studies = _search(server, "/studies", query, _STUDY)
    except Refused as error:
        raise MedclrError(f"{server.shown}: {error}; is this the address of DICOMweb, and the search right?") from error
    if not studies:
        raise MedclrError(f"{server.shown}: the search finds no study")
    with progress("fetch", len(studies), "studies") as advance:
        fetching = _Fetching(server, folder, advance)
        for study in studies:
            fetching.study(study)
            advance(1)
    return fetching.refused


class _Fetching:
    """What was refused on the way, and how many instances came."""

    def __init__(self, server: Server, folder: Path, advance: Advance) -> None:
        self._server = server
        self._folder = folder
        self._advance = advance
        self._count = 0
        self._failures = 0
        self.refused: list[tuple[str, str]] = []

    def study(self, study: str) -> None:
        """Fetch the series of a study that hold images."""
        try:
            found = _search(self._server, f"/studies/{study}/series", [], _SERIES)
        except Refused as error:  # deleted meanwhile, perhaps
            self._refuse(study, f"cannot be searched: {error}")
            return
        for uid, modality in found.items():
            if modality in NOT_IMAGES:
                self.refused.append(
                    (f"{study}/{uid}", f"is a series of {modality}, not of images, and was not fetched")
                )
            else:
                self._series(study, uid)

    def _series(self, study: str, series: str) -> None:
        here = f"/studies/{study}/series/{series}"
        folder = self._folder / study / series
        try:
            found = _search(self._server, f"{here}/instances", [], _INSTANCE)
        except Refused as error:
            self._refuse(f"{study}/{series}", f"cannot be searched: {error}")
            return
        missing = [uid for uid in found if not (folder / f"{uid}.dcm").exists()]
        if missing == list(found) and len(found) > 1:  # in one answer; what that does not bring is asked for one by one
            with suppress(Refused):
                self._get(here, folder, once=True)
        for uid in missing:
            if (folder / f"{uid}.dcm").exists():
                continue
            try:
                self._get(f"{here}/instances/{uid}", folder)
                if not (folder / f"{uid}.dcm").exists():
                    raise Refused("the server sends something else")
            except Refused as error:
                self._refuse(f"{study}/{series}/{uid}", f"cannot be fetched: {error}")

    def _get(self, path: str, folder: Path, once: bool = False) -> None:
        self._server.get(path, _DICOM, lambda answer: self._save(answer, folder), once=once)

    def _save(self, answer: http.client.HTTPResponse, folder: Path) -> None:
        """Save each instance of an answer as soon as all of it is there."""
        boundary = boundary_of(answer.getheader("Content-Type", ""))
        if boundary is None:
            raise Refused("the server sends something that is no multipart/related")
        incoming = folder / _INCOMING
        with files.mendable(self._folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                for blocks in parts(answer, boundary):
                    with incoming.open("wb") as file:
                        file.writelines(blocks)
                    files.flush(incoming)
                    incoming.replace(folder / f"{_uid_of(incoming)}.dcm")
                    self._failures = 0
                    self._count += 1
                    self._advance(0, f"{self._count:,} instances")
            finally:
                incoming.unlink(missing_ok=True)

    def _refuse(self, name: str, reason: str) -> None:
        self.refused.append((name, reason))
        self._failures += 1
        if self._failures >= FAILURES:
            raise MedclrError(
                f"{self._server.shown}: {FAILURES} times in a row it does not give what it lists, the last {reason};"
                " the same command goes on where this stopped"
            )


def _uid_of(path: Path) -> str:
    try:
        with unheard():
            uid = dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]).SOPInstanceUID
    except Exception as error:  # whatever pydicom makes of it
        raise Refused("the server sends something that is no DICOM") from error
    return _checked(uid)


def _search(server: Server, path: str, query: list[tuple[str, str]], tag: str) -> dict[str, str]:
    """UID, the element ``tag``, and modality of all that a search finds.

    Page by page, until one brings nothing new: servers may give fewer at a time than they are asked for.
    """
    found: dict[str, str] = {}
    while True:
        words = urlencode([*query, ("limit", PAGE), ("offset", len(found))])
        page = server.get(f"{path}?{words}", _JSON, _read_json)
        before = len(found)
        found |= {_checked(_text(item, tag)): _text(item, _MODALITY) for item in page}
        if len(found) == before:
            return found


def _read_json(answer: http.client.HTTPResponse) -> list[dict[str, Any]]:
    """PS3.18 annex F.2: a list of objects."""
    if answer.status == 204:  # nothing found
        return []
    kind = answer.getheader("Content-Type", "").partition(";")[0].strip().lower()
    if kind not in (_JSON, "application/json"):
        raise Refused("the server sends something that is no JSON")
    body = answer.read(_JSON_BYTES)
    try:
        items = json.loads(body) if body else []
    except ValueError as error:
        raise BrokenBody("is broken JSON") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Refused("the server sends something that is no list of answers")
    return items


def _text(item: dict[str, Any], tag: str) -> str:
    """The first value of an element, or ''."""
    with suppress(KeyError, IndexError, TypeError):
        return str(item[tag]["Value"][0])
    return ""


def _checked(uid: str) -> str:
    """A UID (PS3.5 section 9.1): it becomes part of a path here and there."""
    if len(uid) > 64 or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", uid):
        raise Refused("the server gives no UID where one must stand")
    return uid
