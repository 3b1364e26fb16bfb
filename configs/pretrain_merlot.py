"""MERLOT-style (Zellers et al. 2021; Reserve, 2022): frames, sound and words in one joint encoder, words masked.

MERLOT contrasts frames with their transcript before the joint encoder and predicts 20 % masked words after it; Reserve adds
sound. 16 frames of YT-Temporal, batch 1024, AdamW, rate 3e-4, decay 0.1, b2 0.98. Its third objective, the order of shuffled
frames, and its masks by attention are not here: words are hidden at random. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, layers, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, whole = is_small(variant), size(variant)
    half = max(1, whole["depth"] // 2)
    fast = dict(scan=True, remat=True)
    encoder = layers(whole, whole["depth"] - half) | fast
    return recipe(
        variant,
        dict(seconds=8.0, frames=16, size=192, sample_rate=16000, text_length=64),
        steps=200_000,
        batch=1024,
        optim=dict(learning_rate=3e-4, warmup=4000, weight_decay=0.1, b2=0.98),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 16, 16), **encoder),
                audio=dict(kind="audio", bins=128, patch=(16, 16), **encoder),
                text=dict(kind="text", vocabulary=512 if small else 32_000, **encoder),
            ),
            fusion=dict(kind="joint", depth=half, width=whole["width"], heads=whole["heads"], **fast),
        ),
        views=dict(clean={}, masked=dict(text=dict(kind="random", ratio=0.2))),
        objectives=dict(
            contrast=dict(
                kind="contrastive", width=whole["width"], pairs=(("video", "text"), ("audio", "text")), scale=20.0
            ),
            words=dict(
                kind="masked", modalities=("text",), width=32 if small else 384, depth=1 if small else 2,
                heads=2 if small else 6,
            ),
        ),
    )  # fmt: skip
