"""VATT-style (Akbari et al. 2021, sec. 3 and 4): separate encoders, two contrastive spaces, half of the tokens dropped.

The source: 32 frames at 10 fps in tubelets of 4 × 16 × 16, raw waveform, captions of HowTo100M with MIL-NCE; DropToken of
50 % for video and sound; temperature 0.07; batch 2048, Adam, rate 1e-4, 500,000 steps. Here the sound is a log-mel
spectrogram, the caption is one (no MIL), and both spaces are as wide as half of 512. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, encoder = is_small(variant), size(variant)
    fast = dict(scan=True, remat=True)
    return recipe(
        variant,
        dict(seconds=3.2, frames=32, size=224, sample_rate=16000, text_length=16),
        steps=500_000,
        batch=2048,
        optim=dict(learning_rate=1e-4, warmup=10_000, weight_decay=0.0, b2=0.999),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(4, 16, 16), **encoder, **fast),
                audio=dict(kind="audio", bins=128, patch=(16, 16), **encoder, **fast),
                text=dict(kind="text", vocabulary=512 if small else 32_000, **encoder, **fast),
            ),
            fusion=dict(kind="late", width=encoder["width"], depth=0, heads=encoder["heads"]),
        ),
        views=dict(dropped=dict(video=dict(kind="random", ratio=0.5), audio=dict(kind="random", ratio=0.5))),
        objectives=dict(
            contrast=dict(
                kind="contrastive",
                view="dropped",
                width=32 if small else 512,
                pairs=(("video", "audio"), ("video", "text")),
                separate=True,
                scale=1 / 0.07,
                chunk=0 if small else 2048,
            )
        ),
    )
