"""The plan of a real step: its exchanges are the expected ones, its memory adds up, what is wrong is named."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vmm.__main__ import main
from vmm.build import load_config
from vmm.planning import lint
from vmm.planning.advice import advise
from vmm.planning.chips import parse_device
from vmm.planning.collectives import collectives
from vmm.planning.expected import closed_form, uses
from vmm.planning.hlo import Module
from vmm.planning.plan import as_json, needed_bytes, plan, without_remat
from vmm.planning.search import Candidate, candidates
from vmm.planning.search import apply as with_candidate
from vmm.planning.topology import libtpu_folder

ROOT = Path(__file__).parent.parent
TARGET = parse_device("cpu-8")


def config(**mesh) -> dict:
    """VideoMAE of two scanned layers, a width that every mesh divides."""
    c = load_config(str(ROOT / "configs" / "pretrain_videomae.py") + ":small")
    encoder = c["trunk"]["encoders"]["video"]
    encoder |= dict(width=64, heads=4, scan=True, remat=True)
    c["trunk"]["fusion"] |= dict(width=64, heads=4)
    c["objectives"]["pixels"] |= dict(width=32, depth=1, heads=2, scan=False, remat=False)
    return c | dict(mesh=mesh, dtype="float32")


@pytest.fixture(scope="module")
def plans():
    return {
        "fsdp": plan(config(data=1, fsdp=8), TARGET),
        "data": plan(config(data=8), TARGET),
        "mixed": plan(config(data=2, fsdp=2, tensor=2), TARGET),
    }


def moved(one, kind: str, role: str) -> set:
    return {"+".join(c.axes) for c in one.exchanges if c.kind == kind and c.role == role}


def test_copies_only_sum_gradients(plans):
    one = plans["data"]
    assert {(c.kind, c.role) for c in one.exchanges if c.role != "scalar"} == {("all-reduce", "gradient")}
    assert one.ratios["all"]["ratio"] == pytest.approx(1.0, abs=0.1)
    assert not one.findings


def test_shards_gather_parameters_and_reduce_gradients(plans):
    one = plans["fsdp"]
    assert moved(one, "all-gather", "parameter") == {"fsdp"}
    assert moved(one, "all-gather", "activation") == set()
    assert moved(one, "all-reduce", "gradient") | moved(one, "reduce-scatter", "gradient") == {"fsdp"}
    assert 0.5 < one.ratios["all"]["ratio"] < 2
    assert not one.findings


def test_three_axes_each_have_their_own(plans):
    one = plans["mixed"]
    assert "fsdp" in moved(one, "all-gather", "parameter")
    assert moved(one, "all-reduce", "activation") == {"tensor"}
    sums = moved(one, "all-reduce", "gradient") | moved(one, "reduce-scatter", "gradient")
    assert {"data", "fsdp"} <= {axis for name in sums for axis in name.split("+")}
    assert not [line for line in one.findings if line.startswith(("activation", "parameter"))]


def test_memory_adds_up(plans):
    """Parameters and two moments in float32, an eighth of each on each device but for what does not divide."""
    m, whole = plans["fsdp"].memory, plans["data"].memory
    bytes_ = 4 * plans["data"].parameters
    assert whole.parameters == bytes_
    assert whole.optimizer == pytest.approx(2 * bytes_, rel=0.01)
    assert bytes_ / 8 <= m.parameters < bytes_ / 8 * 1.1
    assert m.average == 0
    assert m.peak == m.state + m.temporaries + m.program <= m.available
    assert plans["fsdp"].fits
    clip = 8 * 32 * 32 * 3 + 4 * 32000 + 4 * 24 + 3 + 4 + 1
    assert m.batch == pytest.approx(2 * clip, rel=0.01)


def test_flops_without_what_is_computed_again(plans):
    one = plans["data"]
    assert one.model_flops < one.flops < 4 / 3 * one.model_flops * 1.01
    plain = without_remat({"a": {"remat": True, "b": [1]}, "remat": "products"})
    assert plain == {"a": {"remat": False, "b": [1]}, "remat": False}


def test_numbers_hang_together(plans):
    one = plans["fsdp"]
    value = json.loads(json.dumps(as_json(one)))
    assert value["roofline"]["bound"] in ("compute", "memory", "links", "network")
    assert value["step_seconds"] == max(value["roofline"][k] for k in ("compute", "memory", "links", "network"))
    assert value["clips_per_second"] == pytest.approx(one.batch / value["step_seconds"])
    assert value["days"] == pytest.approx(value["step_seconds"] * one.steps / 86400)
    bound = one.model_flops / (8 * TARGET.chip.peak * value["step_seconds"])
    assert value["mfu_bound"] == pytest.approx(bound)
    assert sum(row["total"] for row in value["collectives"]) == pytest.approx(value["closed_form"]["all"]["sent"])


def test_what_does_not_fit_says_what_to_change(plans):
    one = plans["data"]
    tight = dataclasses.replace(
        one.memory, available=one.memory.state + one.memory.program + one.memory.temporaries / 2
    )
    lines = advise(dataclasses.replace(one, memory=tight, whole=False))
    assert any(line.startswith("optim.accumulate=2") for line in lines)
    assert any(line.startswith("mesh.fsdp=8") for line in lines)
    assert any("remat=True" in line for line in lines)
    assert advise(one) == []
    assert needed_bytes("HLO temporaries (336.00G) exceeds available HBM (15.75G).") == 336 * 2**30
    assert needed_bytes("Used 20.5M of 15.75G hbm") == 20.5 * 2**20


# ---- planted faults ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def test_a_gathered_activation_is_named(mesh):
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(state, batch):
        x = jnp.tanh(batch @ state["params"])
        return jax.lax.with_sharding_constraint(x, whole).sum(0), jnp.tanh(x)[:1]

    shapes = (
        {"params": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=split)},
        jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=split),
    )
    text = jax.jit(step).lower(*shapes).compile().as_text().replace("state['params']", "state.params")
    text = text.replace("state[\\'params\\']", "state.params")
    found = collectives(Module(text), dict(mesh.shape), [((256, 512), {0: 8})])
    (line,) = lint.gathered_activations(found, {})
    assert "all-gathered over fsdp" in line
    assert "f32[8,512]" in line
    assert "test_plan.py" in line


def test_a_parameter_whole_under_fsdp_is_named(mesh):
    leaf = jax.ShapeDtypeStruct((1000, 300), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    small = jax.ShapeDtypeStruct((10, 300), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    good = jax.ShapeDtypeStruct((1000, 300), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    (line,) = lint.replicated_parameters({"a/kernel": leaf, "b": small, "c": good}, dict(mesh.shape))
    assert line.startswith("parameter a/kernel [1000, 300] (1.2 MB)")
    assert not lint.replicated_parameters({"a/kernel": leaf}, {"data": 8, "fsdp": 1})


def test_closed_form_by_hand():
    """Three layers of two products over parts of a batch: gathers of a stack, sums of what tensor splits."""

    def loss(up, down, x):
        def layer(x, both):
            return jnp.tanh(x @ both[0]) @ both[1], None

        return jax.lax.scan(jax.checkpoint(layer), x, (up, down))[0].sum()

    jaxpr = jax.make_jaxpr(loss)(jnp.ones((3, 16, 64)), jnp.ones((3, 64, 16)), jnp.ones((8, 16))).jaxpr
    found = uses(jaxpr, 2)
    assert [(use.leaf, use.times, use.contracted, use.again) for use in found] == [
        (0, 1, (1,), True),
        (1, 1, (1,), True),
    ]
    shapes = [(3, 16, 64), (3, 64, 16)]
    split = [{1: ("fsdp",), 2: ("tensor",)}, {1: ("tensor",), 2: ("fsdp",)}]
    expected = closed_form(found, shapes, split, {"data": 2, "fsdp": 4, "tensor": 2})
    matrix = 3 * 16 * 64 * 4 / 2
    assert expected.gathered == {"fsdp": 2 * 2 * matrix * 3 / 4}
    assert expected.reduced == {"fsdp": 2 * matrix * 3 / 4, "data": 2 * 2 * matrix / 4 / 2}
    # The result of `down` (8 × 16 of 3 layers, a device has 1 row) forward and again, and the gradient before `up`.
    assert expected.activations == {"tensor": 3 * 16 * 4 * 2 * (1 / 2) * (2 + 1)}


# ---- the search --------------------------------------------------------------------------------------


def test_candidates_are_configs():
    every = list(candidates(parse_device("cpu-8"), 24, (True, False)))
    assert all(one.data * one.fsdp * one.tensor == 8 for one in every)
    assert any(one.batch == 24 for one in every)
    assert all(one.data % 2 == 0 for one in candidates(parse_device("v5e-4", 2), 24, (True,)))
    one = Candidate(2, 2, 2, 3, 4, "products")
    changed = with_candidate(config(), one)
    assert changed["batch"] == 48 and changed["mesh"] == dict(data=2, fsdp=2, tensor=2)
    assert changed["optim"]["accumulate"] == 4
    assert changed["trunk"]["encoders"]["video"]["remat"] == "products"


# ---- the command -------------------------------------------------------------------------------------


def test_a_search_compiles_the_best_few(plans, monkeypatch, capsys):
    """The config takes too much; what is estimated to fit is compiled, and the fastest that does is returned."""
    from vmm.planning import search as module

    base = plans["fsdp"]
    tried = []

    def compiled(config, target, quick):
        tried.append(config)
        parts = config.get("optim", {}).get("accumulate", 1)
        times = dataclasses.replace(base.times, compute=base.times.compute * 1000 / config["batch"])
        available = base.memory.state + base.memory.temporaries / 2 if len(tried) == 1 else base.memory.available
        memory = dataclasses.replace(base.memory, available=available)
        return dataclasses.replace(base, memory=memory, times=times, batch=config["batch"], accumulate=parts)

    monkeypatch.setattr(module, "plan", compiled)
    best, every = module.search(config(data=1, fsdp=8), TARGET, minutes=1, tries=2)
    assert best.fits and not every[0].fits
    assert len(every) == len(tried) >= 2
    assert best.clips == max(one.clips for one in every[1:])
    assert tried[1]["mesh"].keys() == {"data", "fsdp", "tensor"}
    assert "should fit; compiling 1/2: batch=" in capsys.readouterr().err


def test_the_command_writes_json(tmp_path: Path, capsys):
    out = tmp_path / "plan.json"
    small = str(ROOT / "configs" / "pretrain_videomae.py") + ":small"
    assert main(["plan", small, "--device", "cpu-8", "--json", str(out), "steps=30"]) == 0
    assert "MFU at most" in capsys.readouterr().out
    value = json.loads(out.read_text())
    assert value["fits"] and value["chips"] == 8 and value["steps"] == 30


def test_a_wrong_device_is_one_line(capsys):
    assert main(["plan", "configs/demo.py", "--device", "v5e-33"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vmm: error: device 'v5e-33'") and error.count("\n") == 1


def test_gpus_without_their_plugin_are_one_line(capsys):
    pytest.importorskip("jax")
    try:
        import jax_plugins.xla_cuda13  # noqa: F401

        pytest.skip("the plugin is here")
    except ImportError:
        pass
    assert main(["plan", "configs/demo.py", "--device", "h100-8"]) == 2
    assert 'pip install "jax[cuda13]"' in capsys.readouterr().err


@pytest.mark.skipif(libtpu_folder() is None, reason="libtpu is not installed: make libtpu")
def test_a_tpu_that_is_not_there(tmp_path: Path):
    """A process of its own: libtpu must be found before JAX is imported."""
    out = tmp_path / "plan.json"
    small = str(ROOT / "configs" / "pretrain_videomae.py") + ":small"
    command = ["plan", small, "mesh.data=1", "mesh.fsdp=-1", "dtype=bfloat16", "--device", "v5e-4", "--json", str(out)]
    done = subprocess.run([sys.executable, "-m", "vmm", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    value = json.loads(out.read_text())
    assert value["fits"] and value["topology"] == "2x2"
    assert {row["kind"] for row in value["collectives_by_kind"]} >= {"all-gather"}
    assert not [line for line in value["lint"] if line.startswith(("activation", "parameter"))]
