"""Fine-tuning to events: what happens when, where and with whom, from sight and sound; on the scenes (`vmm data scenes`).

"": windows of 8 s, which are the scenes' whole clips; of a longer video the evaluation takes one every 4 s, and joins what they
tell. `small` runs in seconds. A start from pretrained encoders: init_from.video, init_from.audio. Other data: data.train, the classes
of data.targets.events and of the objective, the seconds of both. `evals.events.picture=FILE.png` draws what was found.
"""

from common import as_config, check

ROOT = "data/scenes"
EVENTS = dict(classes=4, participants=12)


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "small")
    small, seconds, frames = variant == "small", 8.0, 32
    width, heads = (32, 2) if small else (96, 4)
    encoder = dict(width=width, depth=1 if small else 2, heads=heads)
    return dict(
        seed=0,
        steps=20 if small else 1200,
        batch=16,
        data=dict(
            train=f"{ROOT}/train.jsonl",
            tokenizer=f"{ROOT}/tokenizer.json",
            clip=dict(seconds=seconds, frames=frames, size=32 if small else 64, sample_rate=16000, text_length=8),
            targets=dict(events=dict(kind="events", most=4, **EVENTS)),
            evaluation=dict(stride=4.0),
            workers=1,
            cache=2_000_000_000,
        ),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 8, 8) if small else (2, 16, 16), **encoder),
                audio=dict(kind="audio", bins=64, patch=(25, 64), **encoder),
            ),
            fusion=dict(kind="joint", width=width, depth=1, heads=heads),
        ),
        views=dict(clean={}),
        objectives=dict(
            events=dict(
                kind="localise", seconds=seconds, steps=frames, width=width, depth=1, heads=heads,
                participants_weight=2.0, **EVENTS,
            ),
        ),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 50, weight_decay=0.05, ema=0.99),
        evals=dict(events=dict(kind="localisation", data=f"{ROOT}/test.jsonl", subsets=("V", "A", "VA"), sigma=0.3)),
        save_every=10 if small else 200,
        log_every=5 if small else 20,
    )  # fmt: skip
