"""vmm config: the whole config, the difference of two, what a key means; every field of a config's groups is documented."""

import dataclasses
import os
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_config

from vmm.__main__ import main
from vmm.build import load_config, save_config
from vmm.config import Config
from vmm.model import Trunk
from vmm.settings import config_fields, setting_of
from vmm.show_config import explain

DEMO = str(ROOT / "configs" / "demo.py")


def groups() -> list[type]:
    """Every dataclass that is a group of a config, found by what fields declare."""
    found, waiting = [], [Config]
    while waiting:
        cls = waiting.pop()
        if cls not in found:
            found.append(cls)
            waiting += [schema for field in config_fields(cls).values() if (schema := setting_of(field).schema)]
    return found


@pytest.mark.parametrize("cls", [cls for cls in groups() if cls is not Trunk], ids=lambda cls: cls.__name__)
def test_every_field_is_documented_where_it_is_declared(cls: type):
    for name, field in config_fields(cls).items():
        text = setting_of(field).text
        assert text and text[0] not in " ." and text.endswith((".", "}.")), f"{cls.__name__}.{name}: {text!r}"
        assert "\n" not in text and "  " not in text, f"{cls.__name__}.{name}"


def test_all_groups_are_found():
    assert {"Data", "Clip", "Augment", "Optim", "MeshShape", "Guard", "Early", "Adversary", "MixUp", "Card"} <= {
        cls.__name__ for cls in groups()
    }


def test_the_whole_config_is_printed_and_trains_again(capsys, world_folder, tmp_path):
    """What is printed, given as overrides, is the same config."""
    assert main(["config", DEMO + ":small", "optim.ema=0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "optim.ema=0.5" in lines and "optim.b2=0.95  # default" in lines and "steps=20" in lines
    given = [line for line in lines if not line.endswith("# default")]
    save_config(tiny_config(world_folder), tmp_path / "config.json")
    config = load_config(DEMO + ":small", given)
    assert config == load_config(DEMO + ":small", ["optim.ema=0.5"])
    assert main(["config", str(tmp_path / "config.json")]) == 0
    assert f"data.train='{world_folder}/train.jsonl'" in capsys.readouterr().out


def test_two_configs_are_compared(capsys):
    assert main(["config", DEMO, "--diff", DEMO + ":small"]) == 0
    out = capsys.readouterr().out
    assert "batch: 32 → 16" in out and "optim.b2" not in out
    assert main(["config", DEMO, "--diff", DEMO]) == 0
    assert capsys.readouterr().out == "the same\n"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "optim.ema",
            ["float, default 0.0", "Decay of the running average", "depend on it", "vmm.training.optim.Optim"],
        ),
        ("save_every", ["int, default 1000", "may change when a run goes on"]),
        ("evals.retrieval.objective", ["may change when a run goes on"]),
        ("data.augment.mixup.alpha", ["default 0.8", "Beta(alpha, alpha)"]),
        ("data", ["a config must give it", "Keys: train, tokenizer"]),
        ("objectives", ["Kinds: align, captioning"]),
        ("objectives.contrastive.separate", ["bool, default False", "Contrastive", "share of E"]),
        ("trunk.fusion.bottleneck.bottlenecks", ["int, default 4"]),
        ("trunk.encoders.video", ["VideoEncoder", "tubelets"]),
    ],
)
def test_a_key_is_explained(key: str, said: list[str]):
    for words in said:
        assert words in explain(key)


def test_a_key_is_explained_by_the_configs_names():
    config = load_config(DEMO)
    assert "vmm.objectives.contrastive.Contrastive" in explain("objectives.contrast.separate", config)
    assert "default 4" in explain("trunk.fusion.bottlenecks", config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--explain", "optim.emma"], "optim.emma: config.optim has no key 'emma'; did you mean 'ema'?"),
        (["--explain", "objectives.contrastiv.pairs"], "unknown kind 'contrastiv'; did you mean 'contrastive'?"),
        (["--explain", "views.clean.video"], "config.views has no keys that are declared"),
        ([], "give a config, as `vmm config configs/demo.py`"),
        (["nowhere.py"], "config nowhere.py: no such file"),
        ([DEMO, "optim.emma=1"], "optim.emma: no such key; did you mean 'ema'?"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], said: str, capsys):
    assert main(["config", *arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


def test_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "config", "--explain", "guard.patience"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0 and "guard.patience: int, default 3" in done.stdout, done.stderr


def test_a_field_without_words_is_seen():
    @dataclasses.dataclass
    class Bare:
        size: int = 3

    assert not setting_of(config_fields(Bare)["size"]).text
