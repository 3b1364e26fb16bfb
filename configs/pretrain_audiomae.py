"""Audio-MAE (Huang et al. 2022, sec. 4 and appendix): sound alone, 80 % of the spectrogram's patches hidden.

The source trains ViT-B on 10 s clips of AudioSet-2M (1024 frames of 128 bins, patches of 16 × 16) for 32 epochs at batch
512, AdamW, base rate 2e-4 · batch / 256, decay 1e-4, with a decoder of 16 layers of width 512 whose attention is within
shifted windows; here the decoder attends to all, and has 8 layers. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, encoder = is_small(variant), size(variant)
    return recipe(
        variant,
        dict(seconds=10.24, frames=2, size=32, sample_rate=16000, text_length=8),
        steps=120_000,
        batch=512,
        optim=dict(learning_rate=4e-4, warmup=11_000, weight_decay=1e-4),
        trunk=dict(
            encoders=dict(
                audio=dict(
                    kind="audio",
                    frontend="kaldi",
                    bins=128,
                    frames=0 if small else 1024,  # 10.24 s have 1022
                    patch=(16, 16),
                    scan=True,
                    remat=True,
                    **encoder,
                )
            ),
            fusion=dict(kind="late", width=encoder["width"], depth=0, heads=encoder["heads"]),
        ),
        views=dict(masked=dict(audio=dict(kind="random", ratio=0.8))),
        objectives=dict(
            spectrogram=dict(
                kind="masked",
                modalities=("audio",),
                width=32 if small else 512,
                depth=1 if small else 8,
                heads=2 if small else 16,
                scan=True,
                remat=True,
            )
        ),
    )
