"""Captions of clips: a pretrained video encoder, and a decoder that writes what it saw (CoCa, Yu et al. 2022; no contrast).

On the world, from `make demo`'s published model, and by video alone: of the caption, shape, colour and motion can be known, and the
evaluation counts them (`facts`). `scratch`: without a start. `subtitles`: on the scenes (`vmm data scenes`), from sight and
sound, what happens when: random windows of 4 s of clips of 8 s; the evaluation joins windows that overlap by half, as it would
of a long video, and writes .vtt and .srt files. `small` runs in seconds, without a start. Beam search
with the length penalty of Wu et al. (2016). Other data: data.train, data.tokenizer, the vocabulary, the facts.
"""

from common import as_config, check, world_data

# Label → how each of its classes is named in a caption, in order; see `facts` of the evaluator.
FACTS = dict(
    shape=("circle", "square", "triangle", "cross", "ring", "star"),
    colour=("red", "orange", "yellow", "pink", "green", "cyan", "blue", "purple"),
    motion=(
        "moves left", "moves right", "moves up", "moves down", "circles clockwise", "circles anticlockwise", "grows",
        "shrinks",
    ),
)  # fmt: skip


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "scratch", "subtitles", "small")
    return subtitles() if variant == "subtitles" else captions(variant)


def captions(variant: str) -> dict:
    small = variant == "small"
    width, depth, heads = (32, 1, 2) if small else (128, 3, 4)
    return dict(
        seed=0,
        steps=20 if small else 1200,
        batch=16 if small else 32,
        data=world_data(
            labels={name: len(phrases) for name, phrases in FACTS.items()},
            targets=dict(caption=dict(kind="text", of="{caption}", length=24)),
        ),
        trunk=dict(
            encoders=dict(video=dict(kind="video", tubelet=(8, 16, 16), width=width, depth=depth, heads=heads)),
            fusion=dict(kind="late", width=width, depth=0, heads=heads),
        ),
        views=dict(clean={}),
        objectives=dict(
            words=dict(
                kind="captioning",
                writes="caption",
                vocabulary=512,
                context=("video",),
                width=width,
                depth=1 if small else 2,
                heads=heads,
            )
        ),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 60, weight_decay=0.05, ema=0.99),
        init_from={} if variant in ("scratch", "small") else dict(video="runs/demo/published"),
        evals=dict(
            captions=dict(
                kind="captions",
                data="data/world/test.jsonl",
                objective="words",
                subsets=("V",),
                beams=4,
                penalty=0.6,
                facts=FACTS,
            )
        ),
        save_every=10 if small else 200,
        log_every=5 if small else 20,
    )


def subtitles(root: str = "data/scenes") -> dict:
    encoder = dict(width=96, depth=2, heads=4)
    return dict(
        seed=0,
        steps=2000,
        batch=16,
        data=dict(
            train=f"{root}/train.jsonl",
            tokenizer=f"{root}/tokenizer.json",
            clip=dict(seconds=4.0, frames=16, size=48, sample_rate=16000, text_length=8),
            augment=dict(window=True),
            evaluation=dict(stride=2.0),
            targets=dict(subtitles=dict(kind="subtitles", length=56)),
            workers=1,
        ),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(4, 12, 12), **encoder),
                audio=dict(kind="audio", bins=64, patch=(25, 64), **encoder),
            ),
            fusion=dict(kind="late", width=96, depth=0, heads=4),
        ),
        views=dict(clean={}),
        objectives=dict(
            words=dict(
                kind="captioning",
                writes="subtitles",
                vocabulary=512,
                context=("video", "audio"),
                width=96,
                depth=2,
                heads=4,
            )
        ),
        optim=dict(learning_rate=1e-3, warmup=50, weight_decay=0.05, ema=0.99),
        evals=dict(
            subtitles=dict(
                kind="subtitles",
                data=f"{root}/test.jsonl",
                objective="words",
                subsets=("VA", "V"),
                folder="runs/subtitles",
            )
        ),
        save_every=200,
        log_every=20,
    )
