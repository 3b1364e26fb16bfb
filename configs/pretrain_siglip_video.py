"""SigLIP-style video and text (Zhai et al. 2023): pairwise sigmoid loss at a large batch, attention pooling.

The source trains image and text towers at batch 32,768 with scale 10 and bias −10 at the start, AdamW of rate 1e-3, decay
1e-4, b2 0.95. Here the images are clips of 8 frames in tubelets of 2 × 16 × 16, and no device holds the similarities of the
whole batch (`chunk`). Variants: small, S, B, L, H.
"""

from common import as_config, is_small, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, encoder = is_small(variant), size(variant)
    fast = dict(block=dict(activation="gelu_tanh"), positions="learned", scan=True, remat=True)
    return recipe(
        variant,
        dict(seconds=4.0, frames=8, size=224, text_length=64),
        steps=100_000,
        batch=32_768,
        optim=dict(learning_rate=1e-3, warmup=5000, weight_decay=1e-4, accumulate=4),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 16, 16), **fast, **encoder),
                text=dict(kind="text", vocabulary=512 if small else 32_000, **fast, **encoder),
            ),
            fusion=dict(kind="late", width=encoder["width"], depth=0, heads=encoder["heads"]),
        ),
        views=dict(clean={}),
        objectives=dict(
            contrast=dict(
                kind="contrastive", variant="sigmoid", width=encoder["width"], pairs=(("video", "text"),),
                pooling=dict(video="attention_mlp", text="last"), heads=encoder["heads"], project=dict(video="none", text="affine"),
                scale=10.0, max_scale=1000.0, bias=-10.0, chunk=0 if small else 2048,
            )
        ),
    )  # fmt: skip
