"""Answers to questions about clips: the question is the stream of text, and a decoder writes the answer from all streams fused.

On the scenes (`vmm data scenes`), from the encoders of `configs/finetune_caption.py:subtitles` (published to runs/subtitles/published). "":
open answers. `choices`: of four choices, the likeliest is taken. `dialogue`: what was said before stands before the
question, which some questions need; both ways. `scratch`: as `dialogue`, without a start. `small` runs in seconds, as
`dialogue`, without a start. Other data: data.train, data.tokenizer, the vocabulary.
"""

from common import as_config, check

ROOT = "data/scenes"
BASE = "runs/subtitles/published"


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "choices", "dialogue", "scratch", "small")
    small = variant == "small"
    width, depth, heads = (32, 1, 2) if small else (96, 2, 4)
    encoder = dict(width=width, depth=depth, heads=heads)
    talk = variant in ("dialogue", "scratch", "small")
    ways = dict(choices=("choices",)).get(variant, ("open", "choices") if talk else ("open",))
    targets = dict(answer=dict(kind="text", of="{answer}", length=6))
    if "choices" in ways:
        targets |= dict(choices=dict(kind="choices", count=4, length=6))
    return dict(
        seed=0,
        steps=20 if small else 2000,
        batch=16 if small else 32,
        data=dict(
            train=f"{ROOT}/train_questions.jsonl",
            tokenizer=f"{ROOT}/tokenizer.json",
            clip=dict(
                seconds=8.0,
                frames=8 if small else 32,
                size=24 if small else 48,
                sample_rate=16000,
                text_length=24 if talk else 16,
            ),
            text="{history} {question}" if talk else "{question}",
            labels=dict(answer=4),
            targets=targets,
            workers=1,
            cache=4_000_000_000,
        ),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(4, 12, 12), **encoder),
                audio=dict(kind="audio", bins=64, patch=(25, 64), **encoder),
                text=dict(kind="text", vocabulary=512, **encoder),
            ),
            fusion=dict(kind="joint", width=width, depth=1 if small else 2, heads=heads),
        ),
        views=dict(clean={}),
        objectives=dict(
            reply=dict(
                kind="captioning",
                writes="answer",
                choices="choices" if "choices" in ways else "",
                context=("video", "audio", "text"),
                stage="fused",
                width=width,
                depth=1,
                heads=heads,
            )
        ),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 50, weight_decay=0.05, ema=0.99),
        init_from={} if variant in ("scratch", "small") else dict(video=BASE, audio=BASE),
        evals=dict(
            answers=dict(
                kind="answers", data=f"{ROOT}/test_questions.jsonl", objective="reply", ways=ways, subsets=("VAT", "T")
            )
        ),
        save_every=10 if small else 200,
        log_every=5 if small else 20,
    )
