"""Keyed pseudonyms, and what may leave the ward.

A manifest and a slice store carry no identity: patients, studies, series and scans appear as HMAC-SHA256 under a
secret key (RFC 2104). Whoever lacks the key cannot try names or hospital numbers against them, as they could with a
bare hash; whoever has it gets the same pseudonym each time, so that a later scan finds its patient. Of DICOM's text
nothing else is copied but two controlled words, Modality and Body Part Examined.
"""

import hashlib
import hmac
import os
import stat
from pathlib import Path
from typing import Literal

from medclr.errors import MedclrError

KEY_BYTES = 32
_PREFIX = {"patient": "p", "study": "st", "series": "se", "scan": "s"}


class Pseudonyms:
    """Turns identities into pseudonyms; the key stays inside."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self, kind: Literal["patient", "study", "series", "scan"], *identity: str) -> str:
        """Such as ``p-3f2a90c41b7de685``: 64 bits, so that among ten million a collision has odds of 1 to 400,000.

        Args:
            kind: also hashed, so that a patient and a study of the same number get unrelated pseudonyms.
            identity: one or more texts; ("ab", "c") and ("a", "bc") differ.
        """
        message = "\0".join((kind, *identity)).encode("utf-8", "surrogateescape")
        return f"{_PREFIX[kind]}-{hmac.new(self._key, message, hashlib.sha256).hexdigest()[:16]}"


def default_key_file() -> Path:
    """``~/.config/medclr/key``."""
    return Path.home() / ".config" / "medclr" / "key"


def load_key(path: Path) -> bytes:
    """The key in ``path``; on first use one is drawn and written there, readable by its owner alone.

    Raises:
        MedclrError: others may read the file, it is not a key, or it cannot be read or made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _create(path)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise MedclrError(f"{path}: others may read this key; make it yours alone with chmod 600, or use another")
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise MedclrError(f"{path}: the key cannot be used ({error.strerror}); choose another --key-file") from error
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise MedclrError(f"{path}: this is not a medclr key ({KEY_BYTES} bytes in hex); choose another --key-file")
    return key


def _create(path: Path) -> None:
    """Write a new key unless ``path`` exists."""
    try:
        # O_EXCL: never over another key, nor through a link laid there. 0600 from the first byte on.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(os.urandom(KEY_BYTES).hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
