"""The licence, and the files that go along with the weights wherever they go."""

import re
from collections.abc import Sequence
from pathlib import Path

_TRAVELLING = re.compile(r"(licen[sc]e|notice).*|readme\.md", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^(license|license_name):\s*(.+?)\s*$", re.MULTILINE)


def travelling_files(folder: Path) -> tuple[Path, ...]:
    """Return the folder's LICENSE*, LICENCE*, NOTICE* and README.md, sorted by name."""
    files = (path for path in folder.iterdir() if path.is_file() and _TRAVELLING.fullmatch(path.name))
    return tuple(sorted(files))


def licence_name(files: Sequence[Path]) -> str | None:
    """Return the licence that README.md's front matter names, or None.

    A model card with a licence outside of the hub's list says `license: other` and `license_name: ...`.
    """
    card = next((file for file in files if file.name.lower() == "readme.md"), None)
    matter = _FRONT_MATTER.match(card.read_text("utf-8", "replace")) if card is not None else None
    fields = dict(_FIELD.findall(matter.group(1))) if matter is not None else {}
    licence = fields.get("license", "").strip("\"'")
    own_name = fields.get("license_name", "").strip("\"'")
    return own_name if licence in ("", "other") and own_name else licence or None
