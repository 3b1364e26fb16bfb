"""Paths of workdirs: on this machine, or in a bucket ("gs://…", "s3://…")."""

import os
from pathlib import Path

from etils import epath

from vmm.errors import StorageError, UserError

# What reads a bucket: scheme → package.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}


def to_path(path: str | os.PathLike) -> Path | epath.Path:
    """Returns a path with pathlib's methods: Path(…) of pathlib would turn gs://a into gs:/a.

    Raises:
      UserError: the scheme is not known.
      StorageError: nothing that is installed on this host reads such addresses.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(path)
    scheme = text.split("://")[0]
    if scheme not in _PACKAGES:
        raise UserError(f"{text}: unknown kind of address; known: {', '.join(f'{name}://' for name in _PACKAGES)}")
    place = epath.Path(text)
    try:
        place._backend.exists  # noqa: B018  which backend there is; no request is sent
        getattr(place._backend, "fs", lambda _: None)(text)
    except ImportError:
        raise StorageError(f"{text}: needs the package {_PACKAGES[scheme]}; pip install {_PACKAGES[scheme]}") from None
    return place


def absolute(path: str | os.PathLike) -> Path | epath.Path:
    """Returns to_path(path) from the root; addresses are that already (epath's resolve would put a folder before them)."""
    return to_path(path) if is_remote(path) else Path(path).resolve()


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket: no locks, no appending, no space to look up there."""
    return "://" in os.fspath(path)
