"""Where the bytes of a medium lie: a file, a part of a file, a record of a shard, a field of a TFDS example."""

import errno
import functools
import os
from pathlib import Path

from vmm.data.shards import read_record


def read_member(path: str | Path, member: tuple = (), limit: int | None = None) -> bytes:
    """Returns the bytes of a medium, at most `limit` of them.

    Args:
      path: the file, or the folder of a TFDS dataset.
      member: () the whole file; ("bytes", offset, size) a part; ("record", number) of an ArrayRecord shard;
        ("tfds", split, number, field) of a prepared TFDS dataset.

    Raises:
      OSError: it is not there, or broken.
      EOFError: the file ends before the part does.
    """
    kind, *where = member or ("file",)
    if kind in ("file", "bytes"):
        if not os.path.isdir(path) and os.path.exists(path) and not os.path.isfile(path):
            raise PermissionError(errno.EACCES, "a pipe, socket or device, not a file", str(path))
        with open(path, "rb") as file:
            # read(n) takes n bytes of memory before it looks at the file.
            there = os.fstat(file.fileno()).st_size
            offset, size = where if where else (0, there)
            if offset + size > there:
                raise EOFError(f"{max(0, there - offset)} of {size} bytes are there")
            file.seek(offset)
            return file.read(size if limit is None else min(size, limit))
    if kind == "record":
        return read_record(path, where[0])[:limit]
    if kind == "tfds":
        split, number, field = where
        try:
            return _tfds(str(path), split, os.getpid())[number][field][:limit]
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise OSError(errno.EIO, f"example {number} of {split}, {field}: {error}", str(path)) from None
    raise ValueError(f"no such member: {member}")


@functools.lru_cache(maxsize=8)
def _tfds(folder: str, split: str, process: int):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split)
