"""`vmm data build` as a Beam pipeline: the same bytes as on one machine. Needs the extra: `make test-beam`."""

import functools
from pathlib import Path

import pytest

pytest.importorskip("apache_beam", reason='the extra "beam" is not installed; make test-beam runs this')

from vmm.data.building.beam import spread_over_beam
from vmm.data.building.build import Settings, build
from vmm.data.sources import open_source
from vmm.errors import UserError


def built(source: Path, out: Path, **more) -> dict[str, bytes]:
    _, entries, words = open_source(source, None, {})
    build(entries, out, Settings(words, shard=5, budget=0.5), 2, **more)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(world_folder, tmp_path_factory) -> Path:
    """The test split and a broken file."""
    path = world_folder / "test.jsonl"
    table = tmp_path_factory.mktemp("beam") / "clips.jsonl"
    lines = [line.replace('"path": "', f'"path": "{world_folder}/') for line in path.read_text().splitlines()]
    (table.parent / "bad.mp4").write_bytes(b"<html>not here</html>")
    table.write_text("\n".join([*lines, '{"id": "bad", "path": "bad.mp4"}']) + "\n")
    return table


@pytest.mark.parametrize("options", [(), ("--direct_num_workers=2", "--direct_running_mode=multi_processing")])
def test_a_pipeline_gives_the_same_bytes(source, tmp_path, options):
    straight = built(source, tmp_path / "straight")
    spread = functools.partial(spread_over_beam, str(tmp_path / "beam"), "DirectRunner", options)
    assert built(source, tmp_path / "beam", spread=spread) == straight
    assert len([name for name in straight if name.startswith("shards/")]) == 4
    assert b'"not media"' in straight["quarantine.jsonl"]


def test_a_runner_that_is_none(source, tmp_path):
    spread = functools.partial(spread_over_beam, str(tmp_path / "out"), "NoRunner", ())
    with pytest.raises(UserError, match="NoRunner"):
        built(source, tmp_path / "out", spread=spread)
