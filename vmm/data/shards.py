"""ArrayRecord files: records of bytes with random access, in and out."""

import errno
import functools
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from array_record.python import array_record_module

from vmm.errors import StorageError, UserError


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes a shard; it appears whole or not at all. The same records give the same bytes.

    Raises:
      StorageError: the disk is full or gone.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        # One record a group: groups are decompressed whole, 16 to a group read 100 times slower at random.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
        writer.close()
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: could not be written ({error}); free space and run the same command again"
        ) from None


@functools.lru_cache(maxsize=256)
def _reader(path: str, version: tuple, process: int):
    return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")


def _opened(path: str | Path):
    """Returns the shard's reader. It is kept per process (it does not survive a fork) while the file is the same."""
    there = os.stat(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, "no such shard", str(path))
    return _reader(str(path), (there.st_ino, there.st_mtime_ns, there.st_size), os.getpid())


def read_record(path: str | Path, number: int) -> bytes:
    """Returns one record.

    Raises:
      OSError: the file is missing; or, with errno EIO, it is broken or holds fewer records.
    """
    try:
        reader = _opened(path)
        if number >= reader.num_records():  # reading there gives something, and no error
            raise IndexError(f"the shard holds {reader.num_records()}")
        return reader.read([number])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        raise OSError(errno.EIO, f"record {number}: {error}", str(path)) from None


def count_records(path: str | Path) -> int:
    """Returns the number of records of a shard.

    Raises:
      UserError: it is no ArrayRecord file.
    """
    try:
        return _opened(path).num_records()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not an ArrayRecord file ({error})") from None
