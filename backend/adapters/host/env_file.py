"""`.env` in the working directory: whether it may be read, and which names are in it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from dotenv import dotenv_values

from backend.models.trusted_paths import require_trusted

_NAME: Final = ".env"


def trusted_env_file() -> Path | None:
    """Return the file, None where there is none; raise StartRefusedError where others could change it.

    It says which database, which config and which credentials count. One that comes after this isn't read, so
    a directory in which others may make files does no harm.
    """
    path = Path(_NAME).absolute()
    if not os.path.lexists(path):
        return None
    require_trusted(path, f"the file of settings {path}")
    return path


def names_in_env_file() -> Iterable[str]:
    """Return the names that are set there; none where it can't be read, which load_settings says."""
    try:
        return dotenv_values(_NAME, interpolate=False, encoding="utf-8")
    except (OSError, UnicodeError):
        return ()
