"""AV-MAE (Georgescu et al. 2023): sight and sound masked and reconstructed, encoders joined in the middle.

The source trains ViT-L on VGGSound or AudioSet, 16 frames and 8 s of sound, and finds 90 % of the video and 70 to 80 % of
the sound hidden best, and fusion in the last layers better than from the first. The share of fused layers (a sixth), the
decoder (4 layers of width 512) and the rates are ours. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, layers, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, whole = is_small(variant), size(variant, "L")
    fused = max(1, whole["depth"] // 6)
    encoder = layers(whole, whole["depth"] - fused) | dict(scan=True, remat=True)
    return recipe(
        variant,
        dict(seconds=8.0, frames=16, size=224, sample_rate=16000, text_length=8),
        steps=280_000,
        batch=512,
        optim=dict(learning_rate=3e-4, warmup=14_000, weight_decay=0.05),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 16, 16), **encoder),
                audio=dict(kind="audio", bins=128, patch=(16, 16), **encoder),
            ),
            fusion=dict(kind="joint", scan=True, remat=True, **layers(whole, fused)),
        ),
        views=dict(
            masked=dict(
                video=dict(kind="tube", ratio=0.75 if small else 0.9), audio=dict(kind="random", ratio=0.7)
            )
        ),
        objectives=dict(
            reconstruct=dict(
                kind="masked", modalities=("video", "audio"), width=32 if small else 512, depth=1 if small else 4,
                heads=2 if small else 8, context=("video", "audio"), scan=True, remat=True,
            )
        ),
    )  # fmt: skip
