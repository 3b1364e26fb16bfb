"""MBT (Nagrani et al. 2021, sec. 4): sight and sound classified through four bottleneck tokens, fused from layer 8 of 12.

The source starts from ViT-B of ImageNet-21k (`init_from=dict(video=…, audio=…)`), samples 8 s, 8 frames of
them, and trains 50 epochs of VGGSound at batch 64 with SGD, rate 0.5, mixup of 0.3; here with AdamW. The logits of the
streams are averaged, as there. Variants: small, S, B, L, H.
"""

from common import WORLD_LABELS, as_config, is_small, layers, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, whole = is_small(variant), size(variant)
    fused = max(2, whole["depth"] // 3)
    encoder = layers(whole, whole["depth"] - fused) | dict(final_norm=False, scan=True, remat=True)
    labels = WORLD_LABELS if small else dict(sound=309)
    mixup = dict(augment=dict(window=True, area=(0.5, 1.0), flip=True, mixup=dict(alpha=0.3)), labels=labels)
    return recipe(
        variant,
        dict(seconds=8.0, frames=8, size=224, sample_rate=16000, text_length=8),
        data=mixup,
        steps=140_000,
        batch=64,
        optim=dict(learning_rate=3e-4, warmup=7000, weight_decay=0.05),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(1, 16, 16), **encoder),
                audio=dict(kind="audio", bins=128, patch=(16, 16), **encoder),
            ),
            fusion=dict(
                kind="bottleneck", depth=fused, width=whole["width"], heads=whole["heads"], bottlenecks=4,
                scan=True, remat=True,
            ),
        ),
        views=dict(clean={}),
        objectives=dict(labels=dict(kind="classify", labels=labels)),
    )  # fmt: skip
