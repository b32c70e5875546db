"""Whether a place can be written to, asked before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from omnilora.errors import BadValue


def check_folder(path: str | os.PathLike[str], name: str = "output") -> None:
    """Raises :class:`~omnilora.errors.BadValue` where ``path`` is a file or cannot be made; ``name`` is the option's."""
    place = Path(path)
    if os.path.lexists(place) and not place.is_dir():
        raise BadValue(f"{name} = {str(path)!r} is a file.", "Name a folder.")
    _check_above(place, path, name)


def check_file(path: str | os.PathLike[str], name: str = "output") -> None:
    """The same for a file to be written, which may exist. A folder stands for a file inside it."""
    place = Path(path)
    if place.is_file() and not os.access(place, os.W_OK):
        raise BadValue(f"{name} = {str(path)!r} cannot be written.", "Name another place, or change its permissions.")
    _check_above(place if place.is_dir() else place.parent, path, name)


def _check_above(place: Path, path: str | os.PathLike[str], name: str) -> None:
    """The nearest folder that exists must let something be made in it."""
    try:
        above = next(p for p in (place, *place.absolute().parents) if os.path.lexists(p))
    except OSError as error:
        raise BadValue(f"{name} = {str(path)!r}: {error.strerror}.", "Name another place.") from error
    if not above.is_dir():
        raise BadValue(f"{name} = {str(path)!r} cannot be made: {above} is a file.", "Name another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadValue(f"{name} = {str(path)!r} cannot be made: {above} is not writable.",
                       "Name another place, or change its permissions.")  # fmt: skip
