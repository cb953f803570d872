"""Pseudonyms and their key."""

import hashlib
import hmac
from pathlib import Path

import pytest

from medclr.errors import MedclrError
from medclr.scans.privacy import KEY_BYTES, Pseudonyms, load_key


def test_pseudonyms_are_hmac_sha256() -> None:
    key = bytes(range(32))
    expected = hmac.new(key, b"patient\0M\xc3\xbcller^Anna", hashlib.sha256).hexdigest()
    assert Pseudonyms(key)("patient", "Müller^Anna") == f"p-{expected[:16]}"


def test_pseudonyms_depend_on_key_kind_and_every_part() -> None:
    one, other = Pseudonyms(b"1" * 32), Pseudonyms(b"2" * 32)
    names = [
        one("patient", "a"),
        other("patient", "a"),
        one("study", "a"),
        one("scan", "ab", "c"),
        one("scan", "a", "bc"),
    ]
    assert len({name.partition("-")[2] for name in names}) == 5
    assert one("patient", "a") == Pseudonyms(b"1" * 32)("patient", "a")


def test_key_is_made_once_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "config" / "key"
    key = load_key(path)
    assert len(key) == KEY_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path) == key
    assert load_key(tmp_path / "other") != key


def test_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    load_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(MedclrError, match="chmod 600"):
        load_key(tmp_path / "key")


@pytest.mark.parametrize("text", ["", "secret", "ab" * 31, "é"])
def test_what_is_no_key_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(MedclrError, match="not a medclr key"):
        load_key(path)
    assert path.read_text(encoding="utf-8") == text


def test_key_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    with pytest.raises(MedclrError, match="cannot be used"):
        load_key(tmp_path / "config" / "key")
