"""How much of picture and sound should masked modelling hide? Masked modelling alone, read by linear probes."""

RATIOS = (0.3, 0.5, 0.75, 0.9)


def get_study(quick: bool) -> dict:
    length = ("steps=300", "optim.warmup=30", "log_every=25", "save_every=100") if quick else ()
    # The demo's streams in small tubelets, and of its objectives the masked one alone, of both.
    alone = (
        "trunk.encoders.video.tubelet=(8, 8, 8)",
        *(f"objectives.{name}.weight=0.0" for name in ("contrast", "words", "together")),
        "objectives.masked.modalities=('video', 'audio')",
    )
    variants = {
        f"video {video}, audio {audio}": (
            *alone,
            "views.masked.video.kind=tube",
            f"views.masked.video.ratio={video}",
            f"views.masked.audio.ratio={audio}",
            *length,
        )
        for video in RATIOS
        for audio in (RATIOS if not quick else (0.6,))
    }
    return dict(
        config="configs/demo.py" + (":small" if quick else ""),
        variants=variants,
        seeds=(0, 1, 2),
        score="probe/V/shape",
        scores=("probe/V/motion", "probe/A/pitch", "probe/A/rhythm", "probe/VA/both"),
        chance={"probe/V/shape": 1 / 6, "probe/V/motion": 1 / 8, "probe/A/pitch": 1 / 8, "probe/A/rhythm": 1 / 6},
    )
