"""InternVideo2, stage 2 in style (Wang et al. 2024, sec. 3.2): contrast, matching with hard negatives, masked words.

The source starts from its stage-1 video encoder and BERT-large (`init_from=dict(video=…, text=…)`), 8 frames of 224 × 224,
audio by BEATs; all three losses weigh the same; AdamW of rate 5e-5, decay 0.02, batch up to 2048, half of the words masked
and half of the tokens of the video at first; temperature 0.07. Words and pictures meet in the last layers: BERT's from 19 of
24; a third of them here. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, layers, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, whole = is_small(variant), size(variant)
    fused = max(1, whole["depth"] // 3)
    fast = dict(scan=True, remat=True)
    encoder = layers(whole, whole["depth"] - fused) | fast
    return recipe(
        variant,
        dict(seconds=4.0, frames=8, size=224, sample_rate=16000, text_length=40),
        steps=150_000,
        batch=2048,
        optim=dict(learning_rate=5e-5, warmup=5000, weight_decay=0.02, b2=0.98),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(1, 14, 14) if not small else (2, 16, 16), **encoder),
                audio=dict(kind="audio", bins=128, patch=(16, 16), **encoder),
                text=dict(kind="text", vocabulary=512 if small else 32_000, **encoder),
            ),
            fusion=dict(kind="cross", depth=fused, width=whole["width"], heads=whole["heads"], **fast),
        ),
        views=dict(
            clean={},
            masked=dict(text=dict(kind="random", ratio=0.5)),
            other_words={"of": "clean", "swap": "text", "hard": "contrast"},
            other_video={"of": "clean", "swap": "video", "hard": "contrast"},
        ),
        objectives=dict(
            contrast=dict(
                kind="contrastive", width=whole["width"], pairs=(("video", "text"), ("audio", "text")), scale=1 / 0.07
            ),
            match_words=dict(kind="matching", view="other_words", weight=0.5),
            match_video=dict(kind="matching", view="other_video", weight=0.5),
            words=dict(
                kind="masked", modalities=("text",), width=32 if small else 384, depth=1 if small else 2,
                heads=2 if small else 6,
            ),
        ),
    )  # fmt: skip
