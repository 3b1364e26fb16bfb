"""CAV-MAE (Gong et al. 2023, sec. 3 and 4): sound and one picture, contrasted and reconstructed through one joint layer.

The source: 11 layers a modality and 1 joint, 75 % hidden in each, decoder of 8 layers of width 512, contrastive
temperature 0.05 and weight 0.01, AudioSet-2M in 25 epochs. It contrasts the masked views; so does this. There each stream
alone passes the joint layer first, by norms of its own; here streams are contrasted before it, and each has its own
decoder. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, layers, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, whole = is_small(variant), size(variant)
    encoder = layers(whole, whole["depth"] - 1) | dict(scan=True, remat=True)
    masks = dict(video=dict(kind="random", ratio=0.75), audio=dict(kind="random", ratio=0.75))
    return recipe(
        variant,
        dict(seconds=10.24, frames=1, size=224, sample_rate=16000, text_length=8),
        steps=470_000,
        batch=108,
        optim=dict(learning_rate=5e-5, warmup=1000, weight_decay=5e-7, b1=0.95, b2=0.999),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(1, 16, 16), **encoder),
                audio=dict(
                    kind="audio", frontend="kaldi", bins=128, frames=0 if small else 1024, patch=(16, 16), **encoder
                ),
            ),
            fusion=dict(kind="joint", depth=1, width=whole["width"], heads=whole["heads"]),
        ),
        views=dict(masked=masks),
        objectives=dict(
            contrast=dict(
                kind="contrastive", view="masked", weight=0.01, width=whole["width"], pairs=(("audio", "video"),),
                project="none", scale=20.0,
            ),
            reconstruct=dict(
                kind="masked", modalities=("video", "audio"), width=32 if small else 512, depth=1 if small else 8,
                heads=2 if small else 16, scan=True, remat=True,
            ),
        ),
    )  # fmt: skip
