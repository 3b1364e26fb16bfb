"""Where weights lie, as a file tells it that anybody may have written: which of such paths are followed.

The folder of an index tells its model, a folder of adapters its base. Written, these are relative to the folder; read, they may
lead into it, beside it, or into where vmm runs, and elsewhere only if this user wrote the file: its digest is then in the user's
cache, out of reach of who made the folder.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from vmm.errors import UserError

_NOTES = "graphs"  # in the cache; the notes of before were of graphs alone


def tell(source: str | Mapping[str, str], folder: Path) -> str | dict[str, str]:
    """Returns a source as a file in `folder` tells it: a path relative to the folder, a name of the Hub as it is."""
    if isinstance(source, Mapping):
        return {name: tell(one, folder) for name, one in source.items()}
    here = Path(source)
    return os.path.relpath(here.resolve(), folder.resolve()) if here.exists() else str(source)


def follow(told, folder: Path, own: bool, ask: str) -> str | dict[str, str]:
    """Returns the source that a file in `folder` tells, as vmm.load takes it from here.

    Args:
      told: a path relative to the folder or (files of before) to where vmm runs, a name of the Hub, or one for each modality.
      own: whether this user wrote the file. ask: how a user gives the source by hand, as "--model".

    Raises:
      UserError: it is no such thing, or leads elsewhere.
    """
    if isinstance(told, Mapping):
        return {name: follow(one, folder, own, ask) for name, one in told.items()}
    if not isinstance(told, str):
        raise UserError(f"{folder}: names {told!r} where a folder or a name of the Hub stands; give it as {ask}")
    folder = folder.resolve()
    near = [str(folder.parent), os.getcwd()]
    for path in map(os.path.abspath, (folder / told, told)):
        if os.path.isdir(path):
            if not own and not any(os.path.commonpath([root, path]) == root for root in near):
                raise UserError(
                    f"{folder}: names {told}, which is neither beside it nor in {near[1]}; where that is to be read, give it as {ask}"
                )
            return path
    return told


def note_own(file: Path) -> None:
    """Remembers that this user wrote the file; without a home nothing is remembered."""
    with contextlib.suppress(OSError, RuntimeError):
        note = _note(file)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def is_own(file: Path) -> bool:
    """Whether this user wrote a file, to the bit."""
    with contextlib.suppress(OSError, RuntimeError):
        return file.is_file() and _note(file).is_file()
    return False


def _note(file: Path) -> Path:
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmm" / _NOTES / digest
