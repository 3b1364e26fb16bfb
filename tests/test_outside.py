"""Parts from outside: installed packages' kinds, and the contract checks that they can run."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tomllib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from vmm import plugins, testing
from vmm.build import build, class_of, load_config, save_config
from vmm.encoders import ENCODERS
from vmm.errors import UserError
from vmm.evals import EVALS
from vmm.fusion import FUSIONS
from vmm.fusion.late import Late
from vmm.masking import MASKS
from vmm.objectives import OBJECTIVES
from vmm.objectives.base import Objective
from vmm.plugins import Kinds
from vmm.types import Mask

EXAMPLE = ROOT / "examples" / "my_fusion"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example as pip lays it out in a folder of packages, without the net: module, and metadata with its entry point."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "my_fusion.py").write_text((EXAMPLE / "my_fusion.py").read_text())

    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = folder / f"my_fusion-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in found.items())
        for group, found in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(points))
    return folder


def run_with(folder, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, **options
    )


def test_an_installed_kind_is_one_like_any_other(installed, world_folder, tmp_path):
    """It is built, listed and explained by its name, in a process that knows it by its entry point alone.

    (Training with a kind of one's own: test_plugins.py.)
    """
    config = tiny_config(world_folder, mixes=True, steps=1, batch=8, evals={})
    config["trunk"]["fusion"] = dict(kind="my_fusion", width=16, depth=1, heads=2, strength=0.5)
    save_config(config, tmp_path / "config.json")
    code = (
        "import sys\nfrom vmm.__main__ import main\n"
        f"assert main(['config', {str(tmp_path / 'config.json')!r}]) == 0\n"
        "assert main(['config', '--explain', 'trunk.fusion.my_fusion.strength']) == 0\n"
        f"assert main(['config', {str(tmp_path / 'config.json')!r}, 'trunk.fusion.kind=my_fusio']) == 2\n"
    )
    done = run_with(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "default 1.0" in done.stdout and "did you mean 'my_fusion'?" in done.stderr
    assert "trunk.fusion.strength=0.5" in done.stdout
    # Where it is not installed, one line says what is missing.
    with pytest.raises(UserError, match="trunk.fusion.kind: unknown kind 'my_fusion'"):
        class_of(FUSIONS, config["trunk"]["fusion"], "trunk.fusion")


class Point:
    """What importlib.metadata gives."""

    def __init__(self, name, value, found=None):
        self.name, self.value, self.found = name, value, found

    def load(self):
        if self.found is None:
            raise ImportError("no such thing")
        return self.found


def test_names_that_clash_or_break_are_one_line(monkeypatch):
    points = [
        Point("late", "elsewhere:Late", dict), Point("twice", "a:A", dict), Point("twice", "b:B", dict),
        Point("broken", "a:Gone"), Point("fine", "a:Fine", Late),
    ]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "vmm.fusions" else [])
    table = Kinds("fusions", FUSIONS)
    assert table.find("late") is Late and table.find("fine") is Late and table.find("nobody") is None
    assert {"fine", "late", "broken"} <= set(table.names()) and set(table) == set(FUSIONS)
    with pytest.raises(UserError, match="'twice': two installed packages declare it in vmm.fusions .a:A, b:B."):
        table.find("twice")
    with pytest.raises(UserError, match="'broken': a:Gone, declared in vmm.fusions, cannot be imported"):
        table.find("broken")
    with pytest.raises(UserError, match="did you mean 'fine'?"):
        class_of(table, {"kind": "fin"}, "here")
    assert isinstance(build(table, dict(kind="fine", width=4, depth=1, heads=1), "here"), Late)


def test_every_table_takes_kinds_from_outside():
    from vmm.data.sources import SOURCES

    groups = {table.group for table in (ENCODERS, FUSIONS, OBJECTIVES, EVALS, MASKS, SOURCES)}
    assert groups == {f"vmm.{name}" for name in ("encoders", "fusions", "objectives", "evaluators", "masks", "sources")}
    assert plugins.Kinds is Kinds


def test_the_example_keeps_the_contract(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from my_fusion import MyFusion

    testing.check_fusion(MyFusion, strength=0.3)
    study = {}
    exec((EXAMPLE / "study.py").read_text(), {"__file__": str(EXAMPLE / "study.py"), "__name__": "study"}, study)
    assert load_config(str(EXAMPLE / "config.py"))["trunk"]["fusion"]["kind"] == "my_fusion"


def test_our_own_keep_their_contracts():
    testing.check_mask(MASKS["tube"])
    testing.check_encoder(
        ENCODERS["text"], np.random.default_rng(0).integers(1, 50, (4, 8)).astype(np.int32), vocabulary=50
    )
    testing.check_objective(OBJECTIVES["align"], labels={"label": 3})


class Drops(Late):
    def __call__(self, streams, edges=True):
        return {name: tokens for name, tokens in super().__call__(streams, edges).items() if name != "text"}


class Leaks(Late):
    def __call__(self, streams, edges=True):
        return {k: t._replace(x=t.x + t.x.mean(1, keepdims=True)) for k, t in super().__call__(streams, edges).items()}


class Crosses(Late):
    def __call__(self, streams, edges=True):
        return {k: t._replace(x=t.x + t.x[:1]) for k, t in super().__call__(streams, edges).items()}


class Narrow(Late):
    def __call__(self, streams, edges=True):
        return {k: t._replace(x=t.x[..., :8]) for k, t in super().__call__(streams, edges).items()}


class Breaks(Late):
    def __call__(self, streams, edges=True):
        return {
            k: t._replace(x=t.x / jnp.where(t.valid.any(1), 1.0, 0.0)[:, None, None])
            for k, t in super().__call__(streams, edges).items()
        }


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Drops, "keeps every stream"), (Leaks, "that are not valid"), (Crosses, "depends on the batch around it"),
        (Narrow, "shape .5, 4, 16."), (Breaks, "not finite"),
    ],
)  # fmt: skip
def test_a_broken_fusion_is_told(cls, said: str):
    with pytest.raises(AssertionError, match=said):
        testing.check_fusion(cls)


class Mean(Objective):
    """The squared mean of a stream; the class attribute says how it is broken."""

    view: str = "clean"
    weight: float = 1.0
    broken: str = ""

    @nn.compact
    def _x(self, outputs):
        tokens = outputs.encoded["video"]
        x = nn.Dense(3)(jnp.where(tokens.valid[..., None], tokens.x, 0).mean(1))
        return x - x.mean(0) if self.broken == "batch" else x

    def predict(self, outputs, batch):
        return {"x": self._x(outputs)}

    def features(self, outputs, batch):
        valid = batch.valid if self.broken != "filling" else jnp.ones_like(batch.valid)
        error = jnp.square(self._x(outputs)).sum(1)
        return {"error": error if self.broken != "summed" else error.sum(), "valid": valid}

    def loss(self, features):
        weight = features["valid"].astype(jnp.float32)
        count = weight.sum() if self.broken == "nothing" else jnp.maximum(weight.sum(), 1)
        value = (features["error"] * weight).sum() / count
        return value.astype(jnp.float16) if self.broken == "half" else value, {}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("", ""), ("batch", "depend on the batch"), ("filling", "only fill a batch"), ("summed", "by sample"),
        ("nothing", "batch of nothing"), ("half", "float32"),
    ],
)  # fmt: skip
def test_a_broken_objective_is_told(broken: str, said: str):
    if not broken:
        return testing.check_objective(Mean)
    with pytest.raises(AssertionError, match=said):
        testing.check_objective(Mean, broken=broken)


def test_a_broken_mask_and_encoder_are_told():
    class Half:
        def __init__(self, ratio):
            self.ratio = ratio

        def __call__(self, key, valid, grid):
            count = valid.shape[0]
            return Mask(jnp.arange(count // 2), jnp.arange(count // 2, count))

    with pytest.raises(AssertionError, match="all keys give the same mask"):
        testing.check_mask(Half)

    class Sees(ENCODERS["text"]):
        def __call__(self, patches, keep):
            tokens = super().__call__(patches, keep)
            return tokens._replace(x=tokens.x + patches.values.sum(1)[:, None, None] * 0.01)

    ids = np.random.default_rng(0).integers(1, 50, (4, 8)).astype(np.int32)
    with pytest.raises(AssertionError, match="kept tokens see hidden ones"):
        testing.check_encoder(Sees, ids, vocabulary=50)


def test_evaluators_are_checked():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Count:
        data: str = "a"

        def __call__(self, predict):
            return {"clips": len(predict(self.data, "V")["row"]) * 1.0}

    testing.check_evaluator(Count, lambda manifest, subset: {"row": np.arange(3)})

    @dataclasses.dataclass(frozen=True)
    class Whole(Count):
        def __call__(self, predict):
            return {"clips": 3}

    with pytest.raises(AssertionError, match="clips: a float, got int"):
        testing.check_evaluator(Whole, None)


@pytest.mark.exhaustive("builds a wheel")
def test_the_example_installs(tmp_path):
    pytest.importorskip("wheel", reason="this environment builds no wheels without the net")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path), str(EXAMPLE)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code = "from vmm.fusion import FUSIONS; print(FUSIONS.find('my_fusion').__name__)"
    assert run_with(tmp_path, "-c", code).stdout.strip() == "MyFusion"


def test_no_test_framework_is_asked_for():
    code = "import sys, vmm.testing; assert 'pytest' not in sys.modules and 'sklearn' not in sys.modules"
    assert run_with(sysconfig.get_paths()["purelib"], "-c", code).returncode == 0
    assert jax.__version__
