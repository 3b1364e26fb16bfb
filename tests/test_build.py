"""Config → object: overrides, and an error line for everything that can be wrong in a config."""

import dataclasses
import json
from pathlib import Path

import pytest

from vmm.build import build, differences, digest, load_config, make, plain, save_config
from vmm.errors import UserError
from vmm.experiment import Experiment

DEMO = str(Path(__file__).parent.parent / "configs" / "demo.py") + ":small"


@dataclasses.dataclass
class Thing:
    width: int
    rate: float = 1.0
    parts: tuple[int, ...] = (1,)


def test_make_fills_defaults_and_takes_ints_for_floats():
    assert make(Thing, {"width": 3, "rate": 2}, "thing") == Thing(3, 2, (1,))
    assert build({"thing": Thing}, {"kind": "thing", "width": 3}, "x") == Thing(3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "thin", "width": 1}, r"x.kind: unknown kind 'thin'; did you mean 'thing'\? known: thing"),
        ({"width": 1}, "x.kind: missing"),
        ({"kind": "thing", "widht": 1}, r"x.widht: no such key; did you mean 'width'\? known: parts, rate, width"),
        ({"kind": "thing"}, "x.width: missing"),
        ({"kind": "thing", "width": "wide"}, "x.width: expected int, got 'wide'"),
        ({"kind": "thing", "width": 1, "parts": (1, "a")}, "x.parts: expected"),
    ],
)
def test_build_errors(spec, message):
    with pytest.raises(UserError, match=message):
        build({"thing": Thing}, spec, "x")


def test_overrides():
    config = load_config(
        DEMO, ["optim.learning_rate=3e-4", "trunk.fusion.kind=joint", "trunk.fusion.scan=true", "mesh.fsdp=2"]
    )
    assert config["mesh"] == {"fsdp": 2}
    assert config["optim"]["learning_rate"] == 3e-4
    assert config["trunk"]["fusion"]["kind"] == "joint"
    assert config["trunk"]["fusion"]["scan"] is True
    config = load_config(DEMO, ["views.masked.audio.ratio=0.5", "objectives.contrast.pairs=(('video','text'),)"])
    assert config["objectives"]["contrast"]["pairs"] == (("video", "text"),)


def test_a_key_is_taken_out():
    config = load_config(DEMO, ["~trunk.encoders.text", "trunk.fusion.kind=joint"])
    assert sorted(config["trunk"]["encoders"]) == ["audio", "video"]
    assert config["trunk"]["fusion"]["kind"] == "joint"


def test_a_config_as_windows_writes_it(tmp_path):
    save_config({"steps": 3}, tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "config.json").read_bytes())
    assert load_config(str(tmp_path / "config.json")) == {"steps": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("~trunk.encoders.txt", "trunk.encoders has no key 'txt'; did you mean 'text'"),
        ("~steps.more", "it is a value"),
        ("steps", "key=value"),
        ("stepz=3", r"config.stepz: no such key; did you mean 'steps'"),
        ("optm.warmup=3", r"config.optm: no such key; did you mean 'optim'"),
        ("steps.more=3", r"steps is a value \(20\), not a group"),
        ("mesh.dta=2", r"mesh.dta: no such key; did you mean 'data'"),
        ("trunk.encoder.video.width=2", r"trunk.encoder: no such key; did you mean 'encoders'"),
        ("optim.warmpu=3", r"optim.warmpu: no such key; did you mean 'warmup'"),
        ("trunk.fusion.kind=jiont", r"trunk.fusion.kind: unknown kind 'jiont'; did you mean 'joint'"),
        ("trunk.encoders.video.widht=8", r"trunk.encoders.video.widht: no such key; did you mean 'width'"),
        ("trunk.encoders.video.tubelet=(3,12,12)", "tubelet .* does not divide"),
        ("trunk.encoders.video.heads=7", "does not divide over 7 heads"),
        ("data.clip.sise=3", r"data.clip.sise: no such key; did you mean 'size'"),
        ("data.clip.frames=0", "must be positive"),
        ("views.masked.audio.kind=randm", r"unknown mask 'randm'; did you mean 'random'"),
        ("views.masked=tube", r"views.masked: expected a group of keys"),
        ("views.masked.audio.ratio=0.001", "must hide some, and at most all"),
        ("objectives.contrast.view=maskd", r"no view 'maskd'; did you mean 'masked'"),
        ("objectives.masked.modalities=('text',)", "hides nothing of 'text'"),
        ("objectives.contrast.variant=hinge", "unknown variant 'hinge'; known: sigmoid, softmax"),
        ("optim.warmup=30", "leave nothing of the run's 20"),
        ("optim.decay_rules=(('nothing',1.0),('.*',0.0))", "'nothing' matches no parameter"),
        ("optim.rate_rules=(('model/.*',1.0),)", "no rule matches the parameter objective_contrast"),
        ("dtype=float16", "config.dtype: must be float32 or bfloat16"),
        ("batch=0", "config.batch: must be at least 1"),
        ("batch=many", "config.batch: expected int, got 'many'"),
        ("evals.probe.kind=prob", "unknown kind 'prob'"),
    ],
)
def test_every_wrong_key_is_one_line(override, message):
    with pytest.raises(UserError, match=message) as caught:
        Experiment(load_config(DEMO, [override])).program(None)
    assert "\n" not in str(caught.value)


def test_missing_config_lists_the_recipes(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match="no such file; did you mean 'configs/demo.py'"):
        load_config("configs/dmeo.py")


def test_config_survives_json(tmp_path):
    config = load_config(DEMO)
    save_config(config, tmp_path / "config.json")
    again = load_config(str(tmp_path / "config.json"))
    assert again == config
    assert digest(again) == digest(config)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == config["steps"]


def test_two_folders_may_hold_a_common(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "common.py").write_text(f"VALUE = {name!r}")
        (tmp_path / name / "it.py").write_text(
            "from common import VALUE\ndef get_config(variant=''):\n    return dict(value=VALUE)"
        )
    assert [load_config(str(tmp_path / name / "it.py"))["value"] for name in ("a", "b", "a")] == ["a", "b", "a"]


def test_plain_and_differences():
    assert plain({"a": [1, [2, 3]]}) == {"a": (1, (2, 3))}
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 3 → 2", "d: 4 → None"]


def test_a_key_of_a_group_that_was_left_to_be_chosen(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("def get_config(variant=''):\n    return dict(mesh='auto', steps=1)\n")
    assert load_config(str(file), ["mesh.fsdp=4"]) == {"mesh": {"fsdp": 4}, "steps": 1}
    assert load_config(str(file))["mesh"] == "auto"
