"""What the shipped recipes are: their configs, parameters and first losses, as numbers that a change must not move by accident.

    python tests/golden/record.py            # writes them anew and prints what differs
    python tests/golden/record.py losses     # of one kind

A change that is meant to move them commits the new files, with a row in experiments/LOG.md where losses moved.
"""

import hashlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import conftest  # noqa: F401  (devices and compilation as the tests have them)

import flax.linen as nn
import jax
import numpy as np

from vmm.build import differences, load_config
from vmm.config import full
from vmm.experiment import Experiment
from vmm.training.optim import path_of

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.py") if path.name != "common.py")
# What is not the full recipe and its small version; the smallest stands last.
VARIANTS = {"demo.py": ("", "small"), "world_fusion.py": ("", "quick"), "world_latent.py": ("", "random", "small")}
VARIANTS["finetune_identity.py"] = ("", "scratch", "small")
VARIANTS["finetune_caption.py"] = ("", "scratch", "subtitles", "small")
VARIANTS["finetune_answer.py"] = ("", "choices", "dialogue", "scratch", "small")
VARIANTS["world_frames.py"] = ("", "future", "denoise", "adversary", "small")
VARIANTS["real_digits.py"] = ("", "finetune", "scratch", "quick")
VARIANTS["finetune_classify.py"] = ("", "probe", "lora", "layer_decay", "scratch", "small")
# Of different kinds: labels through bottlenecks, two masked ones with contrast, a teacher, a sigmoid, adapters.
TRAINED = (
    "pretrain_mbt.py:small", "pretrain_cav_mae.py:small", "pretrain_vjepa2.py:small", "pretrain_siglip_video.py:small",
    "pretrain_vatt.py:small", "finetune_classify.py:lora",
)  # fmt: skip
STEPS, CLIPS = 10, 8


def variants(recipe: str) -> tuple[str, ...]:
    """Returns a recipe's variants, the smallest last."""
    return VARIANTS.get(recipe, ("", "small"))


def config(name: str) -> dict:
    """Returns a config by "recipe.py:variant", with the defaults filled in, as JSON holds it."""
    return json.loads(json.dumps(full(load_config(f"{CONFIGS / name}"))))


def configs() -> dict:
    """Returns recipe → its first variant's config, and of each other one what differs from that."""
    result = {}
    for recipe in RECIPES:
        first, *others = variants(recipe)
        result[recipe] = whole = config(f"{recipe}:{first}")
        for variant in others:
            result[f"{recipe}:{variant}"] = differences(config(f"{recipe}:{variant}"), whole)
    return result


def shapes(experiment: Experiment) -> dict:
    """Returns path → shape of an experiment's parameters."""
    flat = jax.tree_util.tree_flatten_with_path(nn.unbox(experiment.shapes))[0]
    return {path_of(keys): list(leaf.shape) for keys, leaf in flat}


def summary(parameters: dict) -> dict:
    """Returns how many parameters there are, and a digest of their paths and shapes."""
    text = json.dumps(sorted(parameters.items()))
    count = sum(int(np.prod(shape)) for shape in parameters.values())
    return {"parameters": count, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def parameters() -> dict:
    """Returns the shapes of each recipe's smallest variant, and a summary of each other one's."""
    result = {}
    for recipe in RECIPES:
        for variant in variants(recipe):
            name = f"{recipe}:{variant}"
            found = shapes(Experiment(load_config(f"{CONFIGS / name}")))
            result[name] = found if variant == variants(recipe)[-1] else summary(found)
    return result


def batches(experiment: Experiment) -> list:
    """Returns random batches of STEPS steps: every stream present, ids and labels within what the model knows."""
    spec = experiment.config.trunk["encoders"].get("text", {})
    result = []
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.batch_shapes(CLIPS))
        video, audio, text = (batch.inputs[name].shape for name in ("video", "audio", "text"))
        inputs = {
            "video": rng.integers(0, 256, video, np.uint8),
            "audio": rng.normal(0, 0.1, audio).astype(np.float32),
            "text": rng.integers(4, spec.get("vocabulary", 8), text).astype(np.int32),
        }
        labels = {
            name: rng.integers(0, classes, (CLIPS,)).astype(np.int32)
            for name, classes in experiment.data.labels.items()
        }
        result.append(
            batch._replace(
                inputs=inputs,
                present={name: np.ones(CLIPS, bool) for name in batch.present},
                labels={**batch.labels, **labels},
                index=np.arange(CLIPS, dtype=np.int32) + CLIPS * step,
                valid=np.ones(CLIPS, bool),
            )
        )
    return result


def losses_of(name: str) -> list[float]:
    """Returns the losses of the first steps of a config on random batches, on one device."""
    experiment = Experiment(load_config(f"{CONFIGS / name}", [f"batch={CLIPS}", "init_from={}"]))
    mesh = experiment.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = experiment.program(mesh)
        state, found = program.init(jax.random.key(0)), []
        for batch in batches(experiment):
            state, metrics = program.step(state, batch)
            found.append(float(f"{float(metrics['loss']):.6g}"))
    return found


def losses() -> dict:
    """Returns config → losses of its first steps."""
    return {name: losses_of(name) for name in TRAINED}


KINDS = {"configs": configs, "parameters": parameters, "losses": losses}


def read(kind: str) -> dict:
    """Returns what is recorded."""
    return json.loads((HERE / f"{kind}.json").read_text(encoding="utf-8"))


def main() -> None:
    for kind in sys.argv[1:] or KINDS:
        path = HERE / f"{kind}.json"
        before, now = read(kind) if path.is_file() else {}, KINDS[kind]()
        lines = differences(now, before)
        print(f"{kind}: {len(lines)} differences", *lines, sep="\n  ")
        rows = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in now.items()
        )
        path.write_text("{\n" + rows + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
