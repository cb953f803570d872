"""Keyed pseudonyms, and what may leave the ward.

A manifest and a slice store carry no identity: patients, studies, series, scans and files appear as HMAC-SHA256 under a
secret key (RFC 2104). Whoever lacks the key cannot try names or hospital numbers against them, as they could with a
bare hash, nor match the tables of two sites; whoever has it gets the same pseudonym each time, so that a later scan
finds its patient. Of DICOM's text nothing else is copied but two controlled words, Modality and Body Part Examined.

A key that was rotated (``medclr rekey``) is a chain: pseudonyms of the old key are turned into pseudonyms again under
the new one. So a table is rekeyed without opening a scan, and scans that come later still find their patients.
"""

import contextlib
import hmac
import os
import stat
from pathlib import Path
from typing import Literal

from medclr.errors import MedclrError

KEY_BYTES = 32
Kind = Literal["patient", "study", "series", "scan", "file", "key"]
PREFIX: dict[Kind, str] = {"patient": "p", "study": "st", "series": "se", "scan": "s", "file": "f", "key": "k"}


class Pseudonyms:
    """Turns identities into pseudonyms; the key stays inside."""

    def __init__(self, key: bytes) -> None:
        """``key`` is one key of 32 bytes, or a chain of them, the oldest first."""
        self._chain = [key[i : i + KEY_BYTES] for i in range(0, len(key), KEY_BYTES)]

    def __call__(self, kind: Kind, *identity: str) -> str:
        """Such as ``p-3f2a90c41b7de685``: 64 bits, so that among ten million a collision has odds of 1 to 400,000.

        Args:
            kind: also hashed, so that a patient and a study of the same number get unrelated pseudonyms.
            identity: one or more texts; ("ab", "c") and ("a", "bc") differ.
        """
        for key in self._chain:
            identity = (f"{PREFIX[kind]}-{_hmac(key, kind, *identity)[:16]}",)
        return identity[0]

    def content(self, sha256: str) -> str:
        """What stands for a file's SHA-256: equal for equal bytes, and comparable under the same key alone."""
        for key in self._chain:
            sha256 = _hmac(key, "content", sha256)
        return sha256

    @property
    def name(self) -> str:
        """Tells one key from another and gives neither away."""
        return self("key")


def _hmac(key: bytes, *words: str) -> str:
    return hmac.digest(key, "\0".join(words).encode("utf-8", "surrogateescape"), "sha256").hex()


def default_key_file() -> Path:
    """``~/.config/medclr/key``."""
    return Path.home() / ".config" / "medclr" / "key"


def load_key(path: Path, *, create: bool = True) -> bytes:
    """The key in ``path``, a line of hex, or several lines if it was rotated: 32 bytes each, joined.

    Args:
        path: the key file.
        create: on first use, draw a key and write it there, readable by its owner alone.

    Raises:
        MedclrError: there is none, others may read the file, it is not a key, or it cannot be read or made.
    """
    try:
        if create:
            write_key(path, os.urandom(KEY_BYTES))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise MedclrError(f"{path}: others may read this key; make it yours alone with chmod 600, or use another")
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        raise MedclrError(
            f"{path}: there is no such key; give the --key-file with which the manifest was made"
        ) from None
    except OSError as error:
        raise MedclrError(f"{path}: the key cannot be used ({error.strerror}); choose another --key-file") from error
    except ValueError:
        key = b""
    if not key or len(key) % KEY_BYTES:
        raise MedclrError(f"{path}: this is not a medclr key ({KEY_BYTES} bytes in hex); choose another --key-file")
    return key


def write_key(path: Path, key: bytes) -> None:
    """Write a new key, readable by its owner alone, unless ``path`` exists; OSError if that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.writelines(key[i : i + KEY_BYTES].hex() + "\n" for i in range(0, len(key), KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # whole or not at all, and never over another key
    finally:
        temporary.unlink()
