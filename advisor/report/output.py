"""Write a report's file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from advisor.errors import InputError

_HINT = "Name a file in a folder that exists and that you may write to."


def create_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a new file; one that is there is never touched, and half of one is not left.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    try:
        with open(path, "xb") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                os.unlink(path)
                raise
    except FileExistsError as error:
        raise _exists(path) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be written.", why=f"{reason}.", hint=_HINT) from error


def check_creatable(path: str | os.PathLike[str]) -> None:
    """Find out at once whether `create_file` could make a file there.

    Raises:
        InputError: it could not.
    """
    if os.path.lexists(path):
        raise _exists(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        why = f"{folder} is no folder."
    elif not os.access(folder, os.W_OK):
        why = f"{folder} may not be written to."
    else:
        return
    raise InputError(f"{path} cannot be written.", why=why, hint=_HINT)


def _exists(path: str | os.PathLike[str]) -> InputError:
    return InputError(f"{path} exists already.", hint="Name another file, or move that one away.")
