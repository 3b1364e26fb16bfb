"""What several configs share: the synthetic world as their dataset, and its evaluations."""

# Label → number of classes of the world that `vmm data world` writes.
WORLD_LABELS = dict(
    shape=6, colour=8, motion=8, pitch=8, timbre=6, rhythm=6,
    video=2, audio=2, either=2, both=2, order=2, sync=2,
)  # fmt: skip


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


def world_evals(root: str = "data/world") -> dict:
    """Returns the evals group: retrieval and linear probes on the world's test split."""
    return dict(
        retrieval=dict(kind="retrieval", data=f"{root}/test.jsonl", objective="contrast"),
        probe=dict(kind="probe", train=f"{root}/validation.jsonl", data=f"{root}/test.jsonl"),
    )
