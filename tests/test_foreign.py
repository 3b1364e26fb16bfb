"""Manifests and configs with anything in them: a value or one line, never a traceback."""

import copy
import json
import random

import pytest
from conftest import tiny_config

from vmm.build import load_config, plain
from vmm.data.manifest import read_manifest
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.foreign import parse_json

ROW = {
    "id": "1", "path": "a.mp4", "start": 0.0, "end": 2.0, "caption": ["a", "b"], "labels": {"s": 3, "t": [1, 2]},
    "sha256": "0" * 64, "record": 3, "media": {"duration": 2.0}, "values": {"v": 1.0}, "curves": {"c": [1, 2]},
    "texts": {"q": "what", "subtitles": ["0 1 words"]},
    "events": [{"start": 0, "end": 1, "label": 2, "box": [0, 0, 0.5, 0.5], "participants": [1]}],
}  # fmt: skip
NASTY = [
    None, True, 0, -1, 1.5, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 10**4000, 2**63, 1e308, "",
    "\0", "\ud800", "x" * 100000, [], {}, [[]], {"a": {}}, [None], [10**400], {"": None}, "1", {"start": 10**400},
]  # fmt: skip


def places(value, path=()):
    """Paths of all that is in a value, itself included."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def put(value, path, item):
    value = copy.deepcopy(value)
    group = value
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = item
    return value


def test_rows_of_strangers(tmp_path):
    file, told = tmp_path / "rows.jsonl", []
    cases = [(path, item) for path in places(ROW) if path for item in NASTY]
    for path, item in cases:
        file.write_text(json.dumps(put(ROW, path, item)) + "\n")
        try:
            read_manifest(file)
        except UserError as error:
            told.append(str(error))
    assert not [line for line in told if "\n" in line or len(line) > 5000]
    assert len(cases) / 2 < len(told) < len(cases)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100000, "nested more than 100 deep"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested more than 100 deep"),
        ('{"path": "a", "start": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"path": "a", "labels": {"x": 2147483648}}', "labels must be"),
        ('{"path": "a", "values": {"x": 1e300}}', "values must be"),
        ('{"path": "a", "end": 1e300}', "end must be seconds"),
    ],
)
def test_lines_that_no_reader_may_choke_on(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(file)
    if "must be" not in message:
        with pytest.raises(UserError, match=message):
            load_config(str(file))


def test_what_is_well_formed_is_what_json_makes_of_it():
    text = json.dumps(ROW) + " "
    assert parse_json(text) == ROW
    assert parse_json("[" * 100 + "]" * 100) and parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json(str(2**63 - 1)) == 2**63 - 1


def fuzz(cases: int, folder) -> int:
    config = json.loads(json.dumps(plain(tiny_config(folder, ("video", "audio")))))
    wide = [(path, item) for path in places(config) if path for item in NASTY]
    told = []
    for path, item in random.Random(7).sample(wide, cases):
        try:
            Experiment(plain(put(config, path, item)))
        except UserError as error:
            told.append(str(error))
    assert not [line for line in told if "\n" in line]
    return len(told)


def test_some_configs_of_strangers(tmp_path):
    assert fuzz(15, tmp_path) > 5


@pytest.mark.exhaustive("700 configs: minutes")
def test_many_configs_of_strangers(tmp_path):
    assert fuzz(700, tmp_path) > 300
