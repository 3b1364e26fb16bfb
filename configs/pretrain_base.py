"""Video + audio + text pretraining at ViT-B size: contrastive, masked, fused through bottlenecks.

16 frames of 224 × 224 over 5 s, 90 % tubes hidden (Tong et al. 2022), audio 80 % hidden (Huang et
al. 2022), text 15 %; four bottleneck layers of the twelve (Nagrani et al. 2021). For accelerators:
bfloat16, scanned and rematerialised layers, parameters sharded. `small` runs the same on a laptop,
on the synthetic world.
"""

from common import as_config, check, world_data, world_evals


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "small")
    small = variant == "small"
    width, depth, fused, heads = (32, 1, 2, 2) if small else (768, 8, 4, 12)
    encoder = dict(width=width, depth=depth, heads=heads, scan=True, remat=True)
    data = dict(
        train="data/train.jsonl",
        tokenizer="data/tokenizer.json",
        clip=dict(seconds=5.12, frames=16, size=224, sample_rate=16000, text_length=64),
        augment=dict(window=True, area=(0.5, 1.0), flip=True),
        workers=8,
    )
    evals = dict(retrieval=dict(kind="retrieval", data="data/validation.jsonl", objective="contrast"))
    return dict(
        seed=0,
        steps=20 if small else 100_000,
        batch=16 if small else 1024,
        dtype="float32" if small else "bfloat16",
        data=world_data(clip=dict(seconds=2.0, frames=8, size=32, text_length=24)) if small else data,
        mesh="auto",
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 16, 16), **encoder),
                audio=dict(kind="audio", bins=128, patch=(16, 16), **encoder),
                text=dict(kind="text", vocabulary=512 if small else 32_000, **encoder),
            ),
            fusion=dict(kind="bottleneck", width=width, depth=fused, heads=heads, bottlenecks=4, scan=True, remat=True),
        ),
        views=dict(
            clean={},
            masked=dict(
                video=dict(kind="tube", ratio=0.75 if small else 0.9),
                audio=dict(kind="random", ratio=0.8),
                text=dict(kind="random", ratio=0.15),
            ),
        ),
        objectives=dict(
            contrast=dict(
                kind="contrastive",
                view="clean",
                variant="sigmoid",
                width=width,
                pooling="attention",
                heads=heads,
                scale=10.0,
            ),
            masked=dict(
                kind="masked",
                view="masked",
                width=32 if small else 384,
                depth=1 if small else 4,
                heads=2 if small else 6,
            ),
        ),
        optim=dict(learning_rate=5e-4, warmup=5 if small else 5000, weight_decay=0.05, ema=0.999),
        evals=world_evals() if small else evals,
        save_every=10 if small else 1000,
        log_every=5 if small else 50,
    )
