"""The demo: a small video + audio + text model on the synthetic world, minutes on two cores.

One pass a step, in which a quarter of the sound is hidden. Four things are asked of it. Contrastive between caption and each
of video and audio; video and audio are not contrasted with each other: in this world they share only the bright
background and its hum, and the pair would teach the video encoder just that. Each pair has its own share of the space: a
caption tells of both, and sound, learned first, would else fill it (experiments/LOG.md). The words of the caption, of the
encoded streams. The same of the fused streams, which the text stays apart from: "match" and "clash" are words that neither
sight nor sound tells alone, so that fusion has something to do. And masked modelling of the sound from the fused streams.

`make demo` after the install: 9.2 processor minutes (cores that multiply at 200 GFLOP/s each). On the test split: V→T R@1
71 %, A→T 59 %, VA→T 100 %; fused features tell `both` in 100 % of clips (untrained ones in 55 %), motion in 100, shape in 92
(as video alone), timbre in 86 (audio alone 88).
"""

from common import as_config, check, world_data, world_evals


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "small")
    small = variant == "small"  # the same shape of run, in seconds: for a look, and for tests
    width, heads = (32, 2) if small else (128, 4)
    layers = dict(width=width, heads=heads, scan=True)  # one compiled layer of each kind
    depth = dict(video=1, audio=1, text=1) if small else dict(video=3, audio=2, text=1)
    return dict(
        seed=0,
        steps=20 if small else 1400,
        batch=16 if small else 32,
        data=world_data(),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(8, 12, 12), depth=depth["video"], **layers),
                audio=dict(kind="audio", bins=64, patch=(8, 64), depth=depth["audio"], **layers),
                text=dict(kind="text", vocabulary=512, depth=depth["text"], **layers),
            ),
            fusion=dict(kind="bottleneck", depth=2, bottlenecks=4, **layers),
            apart=("text",),
        ),
        views=dict(masked=dict(audio=dict(kind="random", ratio=0.25))),
        objectives=dict(
            contrast=dict(
                kind="contrastive",
                view="masked",
                weight=1.0,
                width=width,
                pairs=(("video", "text"), ("audio", "text")),
                separate=True,
            ),
            words=dict(kind="words", view="masked", weight=0.5, stage="encoded"),
            together=dict(kind="words", view="masked", weight=0.5),
            masked=dict(
                kind="masked",
                view="masked",
                weight=0.5,
                modalities=("audio",),
                width=width // 2,
                depth=1,
                heads=2,
                standardise=False,
            ),
        ),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 60, weight_decay=0.05, ema=0.99),
        evals=world_evals(),
        save_every=10 if small else 700,
        log_every=5 if small else 10,
    )
