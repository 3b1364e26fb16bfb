"""Workdirs in a bucket: epath and fsspec as they are, over a file system in memory that is registered as gs://."""

import json

import fsspec
import pytest
from etils import epath
from etils.epath import gpath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from vmm.__main__ import main
from vmm.build import load_config, save_config
from vmm.errors import UserError
from vmm.paths import absolute, is_remote, to_path
from vmm.supervise import newest
from vmm.training.metrics import MetricLog, read_rows
from vmm.training.runtime import RunLock, open_workdir


class _Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs:/") if path.startswith("gs://") else path)


@pytest.fixture
def workdir():
    backend = gpath._PREFIX_TO_BACKEND["gs"]
    fsspec.register_implementation("gcs", _Bucket, clobber=True)
    backend._get_filesystem.cache_clear()
    yield to_path("gs://bucket/runs/one")
    backend._get_filesystem.cache_clear()
    _registry.pop("gcs")
    _Bucket.store.clear()


def test_an_address_stays_what_it_is():
    assert str(to_path("runs/a")) == "runs/a" and not is_remote(to_path("runs/a"))
    with pytest.raises(UserError, match="ftp://a: unknown kind of address; known: gs://"):
        to_path("ftp://a")


def test_what_is_missing_is_said(capsys):
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        code = main(["eval", "gs://bucket/run"])
        assert (code, capsys.readouterr().err) == (
            5,  # not the user's command, the host lacks something
            "vmm: error: gs://bucket/run: needs the package gcsfs; pip install gcsfs\n",
        )


def test_files_of_a_workdir_in_a_bucket(workdir):
    assert isinstance(workdir, epath.Path) and str(workdir / "x") == "gs://bucket/runs/one/x"
    assert str(absolute(str(workdir))) == "gs://bucket/runs/one" and is_remote(workdir)
    open_workdir(workdir)
    save_config({"steps": 3, "data": {"seed": (1, 2)}}, workdir / "config.json")
    assert load_config("gs://bucket/runs/one/config.json") == {"steps": 3, "data": {"seed": (1, 2)}}
    log = MetricLog(workdir, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    log = MetricLog(workdir, 2)
    log.write(3, {"loss": 0.5})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_rows(workdir / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.5),
    ]
    assert newest(str(workdir)) is None
    for step in (5, 15):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "whole").write_text("")
    assert newest(str(workdir)) == 15


def test_lock_in_a_bucket(workdir):
    open_workdir(workdir)
    lock = RunLock(workdir, beat=0.2)
    lock.me["pid"] = 1  # not this process, and alive
    with lock:
        assert json.loads((workdir / "lock").read_text())["token"] == lock.me["token"]
        with pytest.raises(UserError, match="gs://bucket/runs/one: another job is running in it"):
            RunLock(workdir, beat=0.2).__enter__()
    assert not (workdir / "lock").exists()
