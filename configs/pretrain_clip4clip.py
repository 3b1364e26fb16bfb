"""CLIP4Clip / X-CLIP-style (Luo et al. 2022; Ma et al. 2022): CLIP's two towers on video, frames encoded apart.

The source starts from CLIP ViT-B/32, its projections and logit scale too (`init_from=CLIP`, a folder or Hub name), takes 12
frames at one a second, averages the frames' embeddings, and fine-tunes with rate 1e-7 for CLIP's weights (here 1e-6) at batch
128, 5 epochs of MSR-VTT. Here frames attend within themselves, and in place of the average one class token for the clip sees
them all. X-CLIP's products of frames and words are not here. Variants: small, S, B, L, H.
"""

from common import as_config, is_small, recipe, size


@as_config
def get_config(variant: str = "") -> dict:
    small, encoder = is_small(variant), size(variant)
    style = dict(block=dict(activation="gelu_quick", epsilon=1e-5), positions="learned", scan=True)
    text = dict(width=32, depth=2, heads=2, vocabulary=512) if small else dict(width=512, depth=12, heads=8, vocabulary=49_408, end=49_407, padding=-1)  # fmt: skip
    return recipe(
        variant,
        dict(seconds=12.0, frames=12, size=224, text_length=77),
        steps=7000,
        batch=128,
        optim=dict(learning_rate=1e-6, warmup=700, weight_decay=0.2, b2=0.98),
        trunk=dict(
            encoders=dict(
                video=dict(
                    kind="video", tubelet=(1, 16, 16) if small else (1, 32, 32), attention="spatial", registers=1,
                    norm_embedding=True, mean=(122.77, 116.75, 104.09), deviation=(68.5, 66.63, 70.32), **style, **encoder,
                ),
                text=dict(kind="text", causal=True, **style, **text),
            ),
            fusion=dict(kind="late", width=0, depth=0, heads=encoder["heads"]),
        ),
        views=dict(clean={}),
        objectives=dict(
            contrast=dict(
                kind="contrastive", width=32 if small else 512, pairs=(("video", "text"),),
                pooling=dict(video="first", text="last"), scale=100.0,
            )
        ),
    )  # fmt: skip
