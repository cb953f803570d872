"""From an opaque id back to the files: for those who hold the key."""

from dataclasses import dataclass
from pathlib import Path

from medclr.data.manifest import read_manifest
from medclr.data.places import find_places
from medclr.errors import MedclrError
from medclr.scans.privacy import default_key_file


@dataclass(frozen=True)
class Whereabouts:
    """The files of each id."""

    files: dict[str, list[Path]]

    def __str__(self) -> str:
        return "\n".join(f"{name}  {path}" for name, paths in self.files.items() for path in paths)


def whereis(ids: list[str], *, manifest: Path | None = None, key_file: Path | None = None) -> Whereabouts:
    """Tell which file an opaque id stands for.

    Args:
        ids: Ids of files and folders (f-...); with a manifest also of its scans, studies and patients (s-, st-, p-).
        manifest: NAME.csv in which scans, studies and patients are looked up.
        key_file: The key of the manifest; if not given, ~/.config/medclr/key.

    Raises:
        MedclrError: an id is not known.
    """
    key_file = Path(key_file) if key_file else default_key_file()
    places = find_places(key_file, [name for name in ids if name.startswith("f-")])
    table = read_manifest(Path(manifest), key_file) if manifest else None
    found: dict[str, list[Path]] = {}
    for name in ids:
        if name in places:
            found[name] = [places[name].absolute()]
            continue
        if table is None:
            raise MedclrError(f"{name}: is no id of a file (f-...); give the --manifest that it stands in")
        scans = [row.scan_id for row in table.rows if name in (row.scan_id, row.study_id, row.patient_id)]
        if not scans:
            raise MedclrError(f"{name}: is no id of {manifest}")
        found[name] = [path for scan in scans for path in table.files[scan].image]
    return Whereabouts(found)
