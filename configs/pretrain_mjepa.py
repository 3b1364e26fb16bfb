"""MJEPA-style: hidden latents of sight and sound predicted from what is shown of both (after V-JEPA 2 and A-JEPA).

Student and teacher are two encoders and joint layers; a predictor for each stream reads the shown tokens of both (`context`)
and predicts the teacher's fused tokens. Masks: blocks of the video as in V-JEPA 2, boxes of the spectrogram (A-JEPA, Fei et
al. 2023). Rates as in V-JEPA 2; the split of the depth is ours. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, layers, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, whole = is_small(variant), size(variant)
    fused = max(1, whole["depth"] // 3)
    fast = dict(scan=not small, remat=not small)
    encoder = layers(whole, whole["depth"] - fused) | fast
    return recipe(
        variant,
        dict(seconds=5.12, frames=16, size=224, sample_rate=16000, text_length=8),
        steps=200_000,
        batch=1024,
        optim=dict(learning_rate=5e-4, warmup=10_000, weight_decay=0.04, b2=0.999, ema=0.998, ema_end=1.0),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 16, 16), **encoder),
                audio=dict(kind="audio", bins=128, patch=(16, 16), **encoder),
            ),
            fusion=dict(kind="joint", depth=fused, width=whole["width"], heads=whole["heads"], **fast),
        ),
        views=dict(
            masked=dict(
                video=dict(kind="multiblock", ratio=0.75, blocks=8, scale=0.15),
                audio=dict(kind="block", ratio=0.5),
            ),
            target=dict(teacher=True),
        ),
        objectives=dict(
            latent=dict(
                kind="latent", stage="fused", context="all", modalities=("video", "audio"),
                width=32 if small else 384, depth=1 if small else 6, heads=2 if small else 12, scan=True, remat=True,
            )
        ),
    )  # fmt: skip
