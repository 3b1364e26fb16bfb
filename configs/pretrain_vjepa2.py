"""V-JEPA 2 (Assran et al. 2025, sec. 2; Bardes et al. 2024 for the masks): hidden tokens' latents predicted, teacher an average.

The source: ViT-L and larger with 3-D rotary positions, 16 frames at 4 fps, 256 × 256, tubelets of 2 × 16 × 16; short-range
masks of 8 blocks of 15 % of the picture and long-range ones of 2 blocks of 70 %, through the whole clip; a predictor of 12
layers of width 384; L1; batch 3072, AdamW, rate 5.25e-4 after warm-up, decay 0.04, average 0.99925. A mask has one count of
hidden tokens here, so blocks are filled up or cut to the `ratio`, and each kind has its own
predictor. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, encoder = is_small(variant), size(variant, "L")
    predictor = dict(
        kind="latent",
        modalities=("video",),
        width=48 if small else 384,
        depth=1 if small else 12,
        heads=2 if small else 12,
        positions="rotary",
        block=dict(activation="gelu"),
        scan=True,
        remat=True,
    )
    return recipe(
        variant,
        dict(seconds=4.0, frames=16, size=256, text_length=8),
        steps=252_000,
        batch=3072,
        optim=dict(learning_rate=5.25e-4, warmup=12_000, weight_decay=0.04, b2=0.999, ema=0.99925, accumulate=4),
        trunk=dict(
            encoders=dict(
                video=dict(
                    kind="video", tubelet=(2, 16, 16), positions="rotary", block=dict(activation="gelu"),
                    scan=not small, remat=not small, **encoder,
                )
            ),
            fusion=dict(kind="late", width=encoder["width"], depth=0, heads=encoder["heads"]),
        ),
        views=dict(
            short=dict(video=dict(kind="multiblock", ratio=0.75, blocks=8, scale=0.15)),
            long=dict(video=dict(kind="multiblock", ratio=0.75 if small else 0.9, blocks=2, scale=0.7)),
            target=dict(teacher=True),
        ),
        objectives=dict(
            short=dict(view="short", weight=0.5, **predictor), long=dict(view="long", weight=0.5, **predictor)
        ),
    )  # fmt: skip
