"""VideoMAE (Tong et al. 2022, table 2 and appendix): video alone, 90 % tubes hidden, decoder of 4 layers.

The source trains 800 epochs of Kinetics-400 at batch 1024 with AdamW (0.9, 0.95), base rate 1.5e-4 · batch / 256,
decay 0.05, 40 epochs of warm-up; the decoder is half as wide as the encoder. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, recipe, size

STYLE = dict(activation="gelu", epsilon=1e-6)


@as_config
def get_config(variant: str = "") -> dict:
    small, encoder = is_small(variant), size(variant)
    return recipe(
        variant,
        dict(seconds=2.13, frames=16, size=224, text_length=8),
        steps=187_000,
        batch=1024,
        optim=dict(learning_rate=6e-4, warmup=9350, weight_decay=0.05),
        trunk=dict(
            encoders=dict(
                video=dict(
                    kind="video", tubelet=(2, 16, 16), positions="sincos_flat", block=STYLE, scan=True, remat=True,
                    mean=(123.675, 116.28, 103.53), deviation=(58.395, 57.12, 57.375), **encoder,
                )
            ),
            fusion=dict(kind="late", width=encoder["width"], depth=0, heads=encoder["heads"]),
        ),
        views=dict(masked=dict(video=dict(kind="tube", ratio=0.75 if small else 0.9))),
        objectives=dict(
            pixels=dict(
                kind="masked",
                modalities=("video",),
                width=encoder["width"] // 2,
                depth=1 if small else 4,
                heads=max(2, encoder["heads"] // 2),
                standardise="colour",
                positions="sincos_flat",
                block=STYLE,
                enter_bias=False,
                scan=True,
                remat=True,
            )
        ),
    )  # fmt: skip
