"""Eight virtual CPU devices, shape-checked modules, one small world for all tests."""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Before JAX starts: devices to shard over, quick compilation (tests compile far more than they
# compute), and compiled programs kept between runs.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # half the time of a test file
if version("jaxlib").startswith("0.10."):  # four times as quick; later releases know no such flag
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
# Two workers of eight devices on two cores: a participant may come late. The default aborts after 40 s.
FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=250"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = os.environ.get("VMM_TEST_PLATFORMS", "cpu")  # "cuda" for what needs a GPU
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
# Everything compiled is kept: files of tests, and processes that they start, compile many of the same programs.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jaxtyping  # noqa: E402

# Annotated shapes of the model side are checked at every call.
CHECKED = ["vmm.layers", "vmm.augment", "vmm.losses", "vmm.masking", "vmm.pairing", "vmm.encoders", "vmm.objectives"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from support.server import server  # noqa: E402

# Tracing makes many small objects that live long: looking through them all the time took a tenth of the tests' time.
gc.set_threshold(200_000, 50, 100)

pytest_plugins = ["support.budget", "support.selection"]
pytest.register_assert_rewrite("families")

WORLD_SIZES = {"train": 48, "validation": 12, "test": 18}


# Longest first, so that parallel workers end together.
SLOW = [
    "test_train.py",
    "test_sharding.py",
    "test_ablate.py",
    "test_publish.py",
    "test_fusion.py",
    "test_objectives.py",
    "test_encoders.py",
    "test_loader.py",
]


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is imported by now stays


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a file are dropped after it: a worker would grow to 4 GB."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _fork_server():
    """Its programs end with the tests."""
    yield
    server.close()


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A small synthetic world: train 48, validation 12 and test 18 clips. Read it, never write into it."""
    from vmm.data import world

    folder = tmp_path_factory.mktemp("world")
    world.generate(folder, WORLD_SIZES)
    return folder


def small_config(world: Path, **changes) -> dict:
    """A tiny model of every part on the test world, as the demo's small variant in the rest; groups replaced by `changes`."""
    from vmm.build import load_config

    config = load_config(str(ROOT / "configs" / "demo.py") + ":small")
    config["data"] |= {"train": f"{world}/train.jsonl", "tokenizer": f"{world}/tokenizer.json", "workers": 0}
    config["data"]["clip"] = dict(seconds=2.0, frames=4, size=24, sample_rate=16000, text_length=24)
    config["evals"] = {"retrieval": dict(kind="retrieval", data=f"{world}/test.jsonl", objective="contrast")}
    encoder = dict(width=32, depth=1, heads=2)
    config["trunk"] = dict(
        encoders=dict(
            video=dict(kind="video", tubelet=(2, 12, 12), **encoder),
            audio=dict(kind="audio", bins=64, patch=(8, 64), **encoder),
            text=dict(kind="text", vocabulary=512, **encoder),
        ),
        fusion=dict(kind="joint", width=32, depth=1, heads=2),  # the least that mixes
    )
    config["views"] = dict(
        clean={},
        masked=dict(
            video=dict(kind="tube", ratio=0.75),
            audio=dict(kind="random", ratio=0.6),
            text=dict(kind="random", ratio=0.3),
        ),
    )
    pairs = (("video", "text"), ("audio", "text"))
    config["objectives"] = dict(
        contrast=dict(kind="contrastive", view="clean", width=32, pooling="attention", pairs=pairs, separate=True),
        masked=dict(kind="masked", view="masked", weight=0.5, width=16, depth=1, heads=2, standardise=False),
    )
    return config | changes


def tiny_config(world: Path, modalities: tuple = ("video", "text"), mixes: bool = False, **changes) -> dict:
    """The least that has all that a run has: two modalities, a hidden and a whole view, contrast and reconstruction.

    It compiles in a quarter of the time of `small_config`. The last modality is contrasted with each other one; the
    first is reconstructed. mixes: one layer of joint attention, else there is no fusion.
    """
    config = small_config(world)
    encoder = dict(width=16, depth=1, heads=2)
    encoders = dict(
        video=dict(kind="video", tubelet=(2, 12, 12), **encoder),
        audio=dict(kind="audio", bins=64, patch=(40, 64), **encoder),
        text=dict(kind="text", vocabulary=512, **encoder),
    )
    fusion = dict(kind="joint", depth=1) if mixes else dict(kind="late", depth=0)
    *others, last = modalities
    config["data"]["clip"] |= dict(frames=2, text_length=24)
    config["trunk"] = dict(
        encoders={name: encoders[name] for name in modalities}, fusion=fusion | dict(width=16, heads=2)
    )
    config["views"] = dict(clean={}, masked={others[0]: dict(kind="random", ratio=0.5)})
    config["objectives"] = dict(
        contrast=dict(kind="contrastive", view="clean", width=16, pairs=tuple((name, last) for name in others)),
        masked=dict(kind="masked", view="masked", modalities=(others[0],), width=16, depth=1, heads=2),
    )
    config["optim"] = dict(learning_rate=1e-3, warmup=2, weight_decay=0.05, ema=0.9)
    return config | changes
