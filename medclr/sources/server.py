"""A web server that is asked again while there is hope: one connection, growing waits, nothing secret in a message.

A dropped connection, a time-out, 429 and 5xx are asked again. Credentials come from the environment or from a netrc
file; certificates are checked; redirects are not followed, so that credentials reach no other host.
"""

import base64
import http.client
import netrc
import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, quote

from medclr.errors import MedclrError, ScanError
from medclr.sources.multipart import BrokenBody

TIMEOUT_SECONDS = 60.0
"""Without a byte from the server."""

WAIT_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Between one attempt and the next."""

LONGEST_WAIT_SECONDS = 120.0
"""That a server may ask for (Retry-After)."""

CREDENTIALS = (
    "set the environment variables MEDCLR_PACS_USER and MEDCLR_PACS_PASSWORD, or MEDCLR_PACS_TOKEN, or write them into"
    " ~/.netrc"
)
"""Where they may come from."""

T = TypeVar("T")


class Refused(ScanError):
    """The server answers, but not with what was asked for; the reason. Others may go well."""


class _Passing(Exception):
    """What may go well if it is asked again."""

    def __init__(self, reason: str, *, answered: bool = False, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.answered = answered
        self.wait_seconds = wait_seconds


class Server:
    """Whatever answers at one address, given as ``dicomweb+https://host:port/path``."""

    def __init__(self, address: SplitResult) -> None:
        self.shown = f"dicomweb+{address.scheme}://{address.netloc}{address.path}"
        """What messages call it."""
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(address.hostname or "", address.port, timeout=TIMEOUT_SECONDS)
        self._path = quote(address.path.rstrip("/"), safe="/%")
        self._credentials = _credentials(address.hostname or "")
        self._has_connected = False

    def get(self, path: str, accept: str, use: Callable[[http.client.HTTPResponse], T], *, once: bool = False) -> T:
        """Ask for ``path`` below the address, and ``use`` the answer, which is no error.

        Args:
            path: quoted already, with a leading '/'.
            accept: the media type that is asked for.
            use: reads the body; what it raises of a broken one is asked again.
            once: do not ask again.

        Raises:
            Refused: the server answers with another status, or with a broken body, also the last time.
            MedclrError: it does not answer, or to nobody like us.
        """
        for wait_seconds in (*WAIT_SECONDS, None):
            try:
                with self._passing():
                    answer = self._ask(path, accept)
                with self._passing(answered=True):
                    result = use(answer)
                    answer.read()  # what is left of it, so that the connection can be used again
                    return result
            except _Passing as problem:
                self._connection.close()
                if once:
                    raise Refused(str(problem)) from problem
                if wait_seconds is None and problem.answered:
                    raise Refused(f"{problem}, {len(WAIT_SECONDS) + 1} times") from problem
                if wait_seconds is None or not self._has_connected:
                    again = "; the same command goes on where this stopped" if self._has_connected else ""
                    raise MedclrError(f"{self.shown}: {problem}{again}") from problem
                time.sleep(min(max(wait_seconds, problem.wait_seconds), LONGEST_WAIT_SECONDS))
            except BaseException:  # the rest of the body is still on its way
                self._connection.close()
                raise
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _ask(self, path: str, accept: str) -> http.client.HTTPResponse:
        headers = {"Accept": accept, "User-Agent": "medclr"}
        if self._credentials:
            headers["Authorization"] = self._credentials
        if self._connection.sock is None:
            self._connection.connect()
            self._has_connected = True
        self._connection.request("GET", self._path + path, headers=headers)
        answer = self._connection.getresponse()
        if answer.status in (200, 204, 206):
            return answer
        told = f"the server answers with status {answer.status}"
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise _Passing(told, answered=True, wait_seconds=_seconds(answer.getheader("Retry-After")))
        if answer.status in (401, 403):
            raise MedclrError(f"{self.shown}: {told}; {CREDENTIALS}")
        if 300 <= answer.status < 400:
            raise MedclrError(f"{self.shown}: {told} and leads elsewhere; give the address that it leads to")
        raise Refused(told)

    @contextmanager
    def _passing(self, answered: bool = False) -> Iterator[None]:
        """Tell what may pass from what will not."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise MedclrError(
                f"{self.shown}: its certificate is not trusted ({error.verify_message}); name the file of your"
                " hospital's authority in the environment variable SSL_CERT_FILE"
            ) from error
        except http.client.InvalidURL as error:
            raise MedclrError(f"{self.shown}: is no address that can be asked") from error
        except BrokenBody as error:
            raise _Passing(f"the server's answer {error}", answered=answered) from error
        except TimeoutError as error:
            raise _Passing(f"the server is silent for {TIMEOUT_SECONDS:.0f} s", answered=answered) from error
        except (http.client.HTTPException, OSError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise _Passing(f"the connection fails ({why})", answered=answered) from error


def _seconds(text: str | None) -> float:
    """Retry-After; a date, which it may also be, says nothing."""
    return float(text) if text and text.isascii() and text.isdigit() else 0.0


def _credentials(host: str) -> str | None:
    """The Authorization header for a host, or None.

    Raises:
        MedclrError: what there is of them is incomplete or cannot be read.
    """
    if token := os.environ.get("MEDCLR_PACS_TOKEN"):
        return f"Bearer {token}"
    user, password = os.environ.get("MEDCLR_PACS_USER"), os.environ.get("MEDCLR_PACS_PASSWORD")
    if user is None and password is None:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        try:
            known = netrc.netrc(path).authenticators(host) if path.exists() else None
        except (netrc.NetrcParseError, OSError, ValueError):  # the parser quotes what it read
            raise MedclrError(f"{path}: cannot be read as a netrc file; correct it, or set NETRC to another") from None
        if known is None:
            return None
        user, _, password = known
    if not user or password is None:
        raise MedclrError("of MEDCLR_PACS_USER and MEDCLR_PACS_PASSWORD one is missing; set both, or none")
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
