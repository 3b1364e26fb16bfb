"""VideoMAE ViT-B (Tong et al. 2022, table 2 and appendix): video alone, 90 % tubes hidden, decoder 4 × 384.

The source trains 800 epochs at batch 1024 with AdamW (0.9, 0.95), base rate 1.5e-4 · batch / 256,
decay 0.05, 40 epochs of warm-up. `small` runs the same on a laptop, on the synthetic world.
"""

from common import world_data


def get_config(variant: str = "") -> dict:
    small = variant == "small"
    width, depth, heads = (32, 2, 2) if small else (768, 12, 12)
    data = dict(
        train="data/train.jsonl",
        tokenizer="data/tokenizer.json",
        clip=dict(seconds=2.13, frames=16, size=224, text_length=8),
        augment=dict(window=True, area=(0.5, 1.0), flip=True),
        workers=8,
    )
    return dict(
        seed=0,
        steps=20 if small else 187_000,
        batch=16 if small else 1024,
        dtype="float32" if small else "bfloat16",
        data=world_data(clip=dict(seconds=2.0, frames=8, size=32, text_length=24)) if small else data,
        mesh=dict(data=-1, fsdp=1),
        trunk=dict(
            encoders=dict(
                video=dict(
                    kind="video", tubelet=(2, 16, 16), width=width, depth=depth, heads=heads, scan=True, remat=True
                )
            ),
            fusion=dict(kind="late", width=width, depth=0, heads=heads),
        ),
        views=dict(masked=dict(video=dict(kind="tube", ratio=0.75 if small else 0.9))),
        objectives=dict(
            pixels=dict(
                kind="masked",
                modalities=("video",),
                width=32 if small else 384,
                depth=1 if small else 4,
                heads=2 if small else 6,
            )
        ),
        optim=dict(learning_rate=6e-4, warmup=5 if small else 9350, weight_decay=0.05),
        save_every=10 if small else 1000,
        log_every=5 if small else 50,
    )
