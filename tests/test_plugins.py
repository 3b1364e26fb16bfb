"""Kinds of one's own, by import path: built, trained and published; never imported for a stranger's folder."""

import json
import sys

import pytest
from conftest import tiny_config

import vmm
from vmm import plugins
from vmm.build import load_config, save_config
from vmm.errors import UserError
from vmm.evaluate import evaluate
from vmm.experiment import Experiment
from vmm.publish import publish
from vmm.publishing.check import check
from vmm.train import train

FUSION = """
from vmm.fusion.joint import Joint

class Mine(Joint):
    extra: int = 3

number = 5
"""
EVALUATOR = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Count:
    data: str

    def __call__(self, predict):
        return {"clips": float(len(predict(self.data, "VAT")["row"]))}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that Python finds; what was admitted and imported of it is forgotten."""
    folder = tmp_path / "environment" / "minepackage"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "fusion.py").write_text(FUSION)
    (folder / "count.py").write_text(EVALUATOR)
    (folder / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(plugins, "_ADMITTED", {})
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "minepackage"]:
        del sys.modules[name]


def mine(world_folder, **changes) -> dict:
    config = tiny_config(world_folder, mixes=True, steps=1, batch=8, save_every=1, log_every=1, **changes)
    config["trunk"]["fusion"] |= dict(kind="minepackage.fusion:Mine", extra=4)
    config["evals"] = {"count": dict(kind="minepackage.count:Count", data=f"{world_folder}/test.jsonl")}
    config["optim"] |= {"warmup": 0}
    return config


def forget():
    plugins._ADMITTED.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "minepackage"]:
        del sys.modules[name]


def test_trained_evaluated_published_and_loaded(package, world_folder, tmp_path, monkeypatch):
    train(mine(world_folder), tmp_path / "run")
    forget()
    assert evaluate(tmp_path / "run")["values"] == {"count/clips": 18.0}
    forget()
    folder = publish(tmp_path / "run", tmp_path / "published")
    assert (
        json.loads((folder / "config.json").read_text())["model"]["trunk"]["fusion"]["kind"]
        == "minepackage.fusion:Mine"
    )
    for source in (folder, tmp_path / "run"):
        forget()
        with pytest.raises(
            UserError, match="does not import by itself.*plugins=.*minepackage.*VMM_PLUGINS=minepackage"
        ):
            vmm.load(source)
        assert "minepackage.fusion" not in sys.modules
        assert vmm.load(
            source, plugins=("minepackage",) if source == folder else ("minepackage.fusion", "minepackage.count")
        )
    forget()
    monkeypatch.setenv(plugins.VARIABLE, "other,minepackage")
    assert vmm.load(folder).embed(text="a word")["text"].shape == (1, 16)
    assert 'plugins=["minepackage.fusion"]' in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="its example fails"):  # a clean process finds no package here
        check(folder)


def test_nothing_is_imported_from_the_published_folder(package, world_folder, tmp_path, monkeypatch):
    stranger = tmp_path / "stranger"
    (stranger / "evil").mkdir(parents=True)
    (stranger / "evil" / "__init__.py").write_text("raise SystemExit('imported')")
    config = {"library_name": "vmm", "model": {"trunk": {"fusion": {"kind": "evil:Fusion"}}}}
    (stranger / "config.json").write_text(json.dumps(config))
    monkeypatch.syspath_prepend(str(stranger))  # as where Python is started in it
    with pytest.raises(UserError, match="lies in .*stranger itself"):
        vmm.load(stranger, plugins=("evil",))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nopackage:Mine", "nopackage cannot be imported .ModuleNotFoundError.*PYTHONPATH"),
        ("minepackage.broken:Mine", "cannot be imported .ZeroDivisionError"),
        ("minepackage.fusion:Yours", "the module minepackage.fusion has no 'Yours'"),
        ("minepackage.fusion:number", "is no dataclass or Linen module"),
        ("minepackage.fusion", "unknown kind 'minepackage.fusion'; known.*package.module:Class"),
    ],
)
def test_what_cannot_be_had_is_one_line(package, world_folder, tmp_path, kind, message):
    config = mine(world_folder)
    config["trunk"]["fusion"]["kind"] = kind
    save_config(config, tmp_path / "config.json")
    with pytest.raises(UserError, match=message) as error:
        Experiment(load_config(str(tmp_path / "config.json")))
    assert "\n" not in str(error.value)


def test_a_field_of_ones_own_is_checked_like_any_other(package, world_folder, tmp_path):
    config = mine(world_folder)
    config["trunk"]["fusion"]["extra"] = "many"
    save_config(config, tmp_path / "config.json")
    with pytest.raises(UserError, match="trunk.fusion.extra: expected int, got 'many'"):
        Experiment(load_config(str(tmp_path / "config.json")))
    assert plugins.modules(config) == ["minepackage.count", "minepackage.fusion"]
