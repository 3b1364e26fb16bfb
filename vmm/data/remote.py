"""Files at addresses (gs://, s3://, https://, …), through fsspec: only where a config asks for it."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import BinaryIO


def is_address(path: str | Path) -> bool:
    """Whether a path names a protocol."""
    return isinstance(path, str) and "://" in path


def open_address(address: str) -> BinaryIO:
    """Returns a file that reads the parts asked for, in blocks.

    Raises:
      OSError: nothing is there, or no installed library speaks the protocol.
    """
    import fsspec

    try:
        return fsspec.open(address, "rb").open()
    except (ImportError, ValueError) as error:  # ValueError: a protocol fsspec does not know
        raise OSError(f"{address}: {error}") from None


def fetch(address: str, folder: str | Path) -> str:
    """Returns the path of a local copy, fetched once; whole or not there, whoever else fetches it too.

    Raises:
      OSError: as open_address, or the disk is full.
    """
    folder = Path(folder)
    kept = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{address.rsplit('/', 1)[-1]}"
    if kept.is_file():
        return str(kept)
    folder.mkdir(parents=True, exist_ok=True)
    with open_address(address) as there, tempfile.NamedTemporaryFile(dir=folder, delete=False) as here:
        try:
            while block := there.read(1 << 22):
                here.write(block)
            here.flush()
            os.replace(here.name, kept)
        except BaseException:
            os.unlink(here.name)
            raise
    return str(kept)
