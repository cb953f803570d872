"""Key rotation: the same manifest under a new key, and what became of each id."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from medclr import files
from medclr.data.manifest import (
    Rejected,
    read_manifest,
    read_rejected,
    read_settings,
    write_manifest,
)
from medclr.data.places import add_places, append, find_places
from medclr.errors import MedclrError
from medclr.scans.privacy import KEY_BYTES, PREFIX, Pseudonyms, default_key_file, load_key, write_key

_KIND = {prefix: kind for kind, prefix in PREFIX.items()}


@dataclass(frozen=True)
class RekeySummary:
    """What was written."""

    manifest: Path
    scans: int
    ids: Path
    """Table of old ids and new."""

    def __str__(self) -> str:
        return (
            f"{self.manifest}: {self.scans:,} scans under the new key\n{self.ids}: each old id and its new one; as"
            " secret as the key"
        )


def ids_path(key_file: Path) -> Path:
    """``KEY.ids.csv`` beside ``KEY``."""
    return key_file.with_name(f"{key_file.name}.ids.csv")


def rekey(manifest: Path, out: Path, new_key_file: Path, *, key_file: Path | None = None) -> RekeySummary:
    """Write a manifest again with the pseudonyms of a new key.

    Files, labels, masks and splits stay. The new key continues the old one, so that scans can still be added; without
    it nobody can tell which ids of the two manifests belong together. NEW_KEY.ids.csv says it, so that stores and runs
    made before can be followed. No scan is opened.

    Args:
        manifest: NAME.csv that medclr index wrote.
        out: The new manifest; must not exist.
        new_key_file: Secret key to change to; drawn if it does not exist. Give the same one for other manifests of the
            old key.
        key_file: Key of the manifest; if not given, ~/.config/medclr/key.

    Raises:
        MedclrError: the manifest is incomplete or of another key, the new key is no successor of the old, ``out``
            exists, or something cannot be written.
    """
    manifest, out, new_key_file = Path(manifest), Path(out), Path(new_key_file)
    key_file = Path(key_file) if key_file else default_key_file()
    if out.suffix != ".csv":
        raise MedclrError(f"--out {out}: the name of a manifest ends in .csv")
    old_key = load_key(key_file, create=False)
    settings = read_settings(manifest)
    if settings.key != Pseudonyms(old_key).name:
        raise MedclrError(f"{manifest}: was made with another key than {key_file}; give its --key-file")
    with files.alone(out.parent, f".{out.name}.lock"):
        if out.exists() or files.is_pending(out):
            raise MedclrError(f"--out {out}: exists already and is left as it is; choose another")
        old = read_manifest(manifest, key_file)
        rejected = read_rejected(manifest)
        new_key = _successor(new_key_file, old_key)
        newer = Pseudonyms(new_key[len(old_key) :])
        new_of: dict[str, str] = {"": ""}

        def new(name: str) -> str:
            if name not in new_of:
                new_of[name] = newer(_KIND[name.partition("-")[0]], name)
            return new_of[name]

        def path(name: str) -> str:
            return name if settings.keep_paths else new(name)

        rows = [
            replace(
                row,
                scan_id=new(row.scan_id),
                patient_id=new(row.patient_id),
                study_id=new(row.study_id),
                path=path(row.path),
                sha256=newer.content(row.sha256),
                mask_path=path(row.mask_path),
            )
            for row in old.rows
        ]
        file_rows = [
            row._replace(
                scan_id=new(row.scan_id), path=path(row.path), series=new(row.series), patient=new(row.patient)
            )
            for row in old.file_rows
        ]
        rejected = [Rejected(path(row.path), row.reason) for row in rejected]
        places = find_places(key_file, (name for name in new_of if name.startswith("f-")))
        add_places(new_key_file, {new(name): place for name, place in places.items()})
        append(ids_path(new_key_file), ("old", "new"), {name: (to,) for name, to in new_of.items() if name})
        write_manifest(out, rows, file_rows, rejected, replace(settings, key=Pseudonyms(new_key).name))
    return RekeySummary(out, len(rows), ids_path(new_key_file))


def _successor(path: Path, old_key: bytes) -> bytes:
    """The key in ``path``, which continues ``old_key``; drawn if there is none."""
    if not path.exists():
        try:
            write_key(path, old_key + os.urandom(KEY_BYTES))
        except OSError as error:
            raise MedclrError(f"{path}: the key cannot be made ({error.strerror}); choose another") from error
    key = load_key(path, create=False)
    if not (key.startswith(old_key) and len(key) > len(old_key)):
        raise MedclrError(
            f"{path}: does not continue the key of the manifest; choose a --new-key-file that is not there"
        )
    return key
