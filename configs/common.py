"""What several configs share: the synthetic world as their dataset, the sizes of Vision Transformers, the shape of a recipe."""

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

# Label → number of classes of the world that `vmm data world` writes.
WORLD_LABELS = dict(
    shape=6, colour=8, motion=8, pitch=8, timbre=6, rhythm=6,
    video=2, audio=2, either=2, both=2, order=2, sync=2,
)  # fmt: skip

# Width, depth, heads (Dosovitskiy et al. 2021, table 1; S: Touvron et al. 2021, table 1; g: Zhai et al. 2022, table 2).
SIZES = dict(S=(384, 12, 6), B=(768, 12, 12), L=(1024, 24, 16), H=(1280, 32, 16), g=(1408, 40, 16))
# Hidden units of an MLP by its width, where they are not four times as many.
RATIOS = dict(g=48 / 11)


def world_data(root: str = "data/world", **changes) -> dict:
    """Returns the data group for the world in `root`: 2 s clips, 8 frames of 48 × 48."""
    data = dict(
        train=f"{root}/train.jsonl",
        tokenizer=f"{root}/tokenizer.json",
        clip=dict(seconds=2.0, frames=8, size=48, sample_rate=16000, text_length=24),
        labels=WORLD_LABELS,
        workers=1,
        cache=1_000_000_000,
    )
    return data | changes


def scenes_data(root: str = "data/scenes", **changes) -> dict:
    """Returns the data group for the scenes in `root`: 8 s clips, 32 frames of 48 × 48."""
    data = dict(
        train=f"{root}/train.jsonl",
        tokenizer=f"{root}/tokenizer.json",
        clip=dict(seconds=8.0, frames=32, size=48, sample_rate=16000, text_length=24),
        workers=1,
        cache=1_000_000_000,
    )
    return data | changes


def scenes_trunk(small: bool) -> dict:
    """Returns a trunk for scenes: four moments a second, nine places of the picture, and the sound."""
    width, depth, heads = (32, 1, 2) if small else (96, 2, 4)
    encoder = dict(width=width, depth=depth, heads=heads)
    return dict(
        encoders=dict(
            video=dict(kind="video", tubelet=(2, 16, 16), **encoder),
            audio=dict(kind="audio", bins=64, patch=(16, 64), **encoder),
        ),
        fusion=dict(kind="joint", width=width, depth=1, heads=heads),
    )


def world_evals(root: str = "data/world") -> dict:
    """Returns the evals group: retrieval and linear probes on the world's test split."""
    return dict(
        retrieval=dict(kind="retrieval", data=f"{root}/test.jsonl", objective="contrast"),
        probe=dict(
            kind="probe",
            train=f"{root}/validation.jsonl",
            data=f"{root}/test.jsonl",
            features=128,
            penalties=(0.001, 0.01, 0.1, 1.0),
            untrained=("VA",),
        ),
    )


def check(variant: str, *known: str) -> None:
    """Raises ValueError: the recipe has no such variant; "" is the recipe itself."""
    if variant not in ("", *known):
        raise ValueError(f"no variant {variant!r} of this recipe; known: {', '.join(known)}")


def is_small(variant: str) -> bool:
    """Whether the variant is "small": the same recipe on a laptop, on the synthetic world."""
    check(variant, "small", *SIZES)
    return variant == "small"


def size(variant: str, default: str = "B") -> dict:
    """Returns width, depth and heads, of "g" the MLP's ratio too, of a variant: "S", "B", "L", "H", "g", or a toy for "small"."""
    width, depth, heads = (32, 2, 2) if is_small(variant) else SIZES[variant or default]
    ratio = dict(ratio=RATIOS[variant or default]) if (variant or default) in RATIOS else {}
    return dict(width=width, depth=depth, heads=heads) | ratio


def layers(dimensions: dict, depth: int) -> dict:
    """Returns the dimensions with another depth; of "small", whose depth is 2, at most 1."""
    return dimensions | dict(depth=min(depth, 1) if dimensions["depth"] == 2 else depth)


def recipe(
    variant: str, clip: dict, *, optim: dict, steps: int, batch: int, data: dict | None = None, **groups
) -> dict:
    """Returns a whole config: on data/*.jsonl in bfloat16, or, small, on the world in seconds.

    clip, data: of the full recipe. optim, steps, batch: of the full recipe; small has its own. groups: trunk, views,
    objectives, and what else a config holds; `evals` only where not small.
    """
    small = is_small(variant)
    if small:
        groups["evals"] = {}
        optim = {key: value for key, value in optim.items() if key not in ("learning_rate", "warmup", "accumulate")}
        return dict(
            seed=0, steps=20, batch=16, dtype="float32", save_every=10, log_every=5,
            data=world_data(clip=dict(seconds=2.0, frames=8, size=32, text_length=24)),
            optim=dict(learning_rate=1e-3, warmup=5) | optim,
            **groups,
        )  # fmt: skip
    augment = dict(window=True, area=(0.5, 1.0), flip=True)
    full = dict(train="data/train.jsonl", tokenizer="data/tokenizer.json", clip=clip, augment=augment, workers=8)
    return dict(
        seed=0, steps=steps, batch=batch, dtype="bfloat16", save_every=1000, log_every=50,
        data=full | (data or {}),
        mesh="auto",
        optim=optim,
        **groups,
    )  # fmt: skip


def as_config(function: Callable[..., dict]) -> Callable[..., ConfigDict]:
    """Makes of get_config(variant) → groups of keys one that returns an ml_collections.ConfigDict, to be changed by attribute."""

    @functools.wraps(function)
    def get_config(variant: str = "") -> ConfigDict:
        return _ordered(function(variant))

    return get_config


def _ordered(group: dict) -> ConfigDict:
    """Returns a group in the order of its keys, all the way down: streams are laid out in it."""
    result = ConfigDict(allow_dotted_keys=True, sort_keys=False)
    for key, value in group.items():
        result[key] = _ordered(value) if isinstance(value, dict) else value
    return result
