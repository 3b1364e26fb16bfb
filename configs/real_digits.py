"""Handwritten digits that move, spoken digits: pretrained without labels in minutes on two cores, then few labels.

The data is what `experiments/0007-real/make.py` writes of MNIST and the Free Spoken Digit Dataset (the AV-MNIST recipe).
"": sight and sound of a clip are contrasted, and both reconstructed from half of their patches. `finetune`: a run of that
learns the digit from labelled clips, each layer at 0.75 of the rate above it, a new head at five times. `scratch`: as
`finetune`, without a start. `quick`: as "", in seconds. Labelled clips are shown one stream at a time, whose heads'
votes are averaged where both are there: evaluated on sight, on sound, and on both.
"""

from common import as_config, check

ROOT = "data/digits"
LABELS = dict(digit=10)
SUBSETS = ("V", "A", "VA")
AUGMENT = dict(gain=3.0, spectrogram=dict(time_width=10, mel_width=6))


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "finetune", "scratch", "quick")
    quick, labelled = variant == "quick", variant in ("finetune", "scratch")
    width, depth, heads = (32, 1, 2) if quick else (64, 3, 4)
    encoder = dict(width=width, depth=depth, heads=heads)
    sound = dict(sample_rate=8000, window=256, hop=80, bins=64, mean=-7.0, deviation=3.2)
    config = dict(
        seed=0,
        steps=20 if quick else 1500,
        batch=16 if quick else 64,
        data=dict(
            train=f"{ROOT}/train.jsonl",
            tokenizer=f"{ROOT}/tokenizer.json",
            clip=dict(seconds=1.0, frames=4, size=32, sample_rate=8000, text_length=8),
            labels=LABELS,
            augment=AUGMENT,
            workers=0,
            cache=1_000_000_000,
        ),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(4, 8, 8), mean=(50.0,) * 3, deviation=(40.0,) * 3, **encoder),
                audio=dict(kind="audio", patch=(10, 32), **sound, **encoder),
            ),
            fusion=dict(kind="late", width=width, depth=0, heads=heads),
        ),
        views=dict(clean={}),
        optim=dict(learning_rate=1e-3, warmup=5 if quick else 50, weight_decay=0.05, ema=0.99),
        save_every=10 if quick else 250,
        log_every=5 if quick else 10,
    )
    if labelled:
        return config | labels(config, variant)
    hidden = dict(kind="random", ratio=0.5)
    config["views"] |= dict(masked=dict(video=hidden, audio=hidden))
    config["objectives"] = dict(
        contrast=dict(kind="contrastive", view="clean", width=width, pairs=(("video", "audio"),)),
        masked=dict(
            kind="masked", view="masked", modalities=("video", "audio"), width=width // 2, depth=1, heads=2,
        ),
    )  # fmt: skip
    config["evals"] = dict(
        retrieval=dict(kind="retrieval", data=f"{ROOT}/validation.jsonl", objective="contrast"),
        digits=dict(kind="probe", train=f"{ROOT}/train-200-0.jsonl", data=f"{ROOT}/validation.jsonl", subsets=SUBSETS),
    )
    return config


def labels(config: dict, variant: str) -> dict:
    """Returns the groups of a training on labelled clips."""
    rates = dict(
        finetune=dict(learning_rate=1e-3, layer_decay=0.75, rate_rules=(("objective_.*", 5.0), (".*", 1.0))),
        scratch=dict(learning_rate=1e-3),
    )
    augment = AUGMENT | dict(drop=1.0, mixup=dict(alpha=0.4))
    return dict(
        steps=600,
        data=config["data"] | dict(train=f"{ROOT}/train-200-0.jsonl", augment=augment),
        objectives=dict(labels=dict(kind="classify", labels=LABELS)),
        optim=dict(warmup=40, weight_decay=0.05, ema=0.99) | rates[variant],
        init_from={} if variant == "scratch" else "runs/digits",
        evals=dict(digits=dict(kind="classification", data=f"{ROOT}/validation.jsonl", subsets=SUBSETS)),
        save_every=600,
    )
