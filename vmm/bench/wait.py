"""The share of a training step spent waiting for input, as arithmetic: clips that a device eats, clips that cores give.

Nothing here runs on a device: the step's time is given, or follows from the floating-point operations of a
clip, the device's peak and the share of it that a training reaches.
"""

from typing import NamedTuple

from vmm.errors import UserError, one_of


class Size(NamedTuple):
    """A video transformer as it is trained. masked: share of the tokens that are hidden; 0: all are encoded.

    decoder_width, decoder_depth: of the masked autoencoder that restores the hidden tokens.
    """

    width: int
    depth: int
    masked: float = 0.0
    decoder_width: int = 0
    decoder_depth: int = 0


MODELS = {
    "vit_b": Size(768, 12),
    "vit_l": Size(1024, 24),
    "videomae_b": Size(768, 12, 0.9, 384, 4),
}


def clip_flops(model: str | Size, frames: int = 16, size: int = 224, tubelet: int = 2, patch: int = 16) -> float:
    """Returns the floating-point operations of training on one clip: three forward passes less the embedding's first.

    A block of width d over n tokens takes 24 n d² + 4 n² d, the products of its matrices. Sound, text, heads
    and norms are left out: they make a step longer, so the share of waiting is a bound from above.

    Raises:
      UserError: no such model; lists the known ones.
    """
    if isinstance(model, str) and model not in MODELS:
        raise UserError(f"--model: {one_of(model, MODELS)}")
    width, depth, masked, narrow, decoder = MODELS[model] if isinstance(model, str) else model
    side = size // patch
    place = side * side
    tokens = frames // tubelet * place
    values = tubelet * patch * patch * 3
    seen = frames // tubelet * (place - int(masked * place))  # a tube hides the same places in every frame
    embed = 2 * seen * values * width
    forward = embed + depth * _block(seen, width)
    if masked:
        forward += 2 * seen * width * narrow + decoder * _block(tokens, narrow)
        forward += 2 * (tokens - seen) * narrow * values
    return 3.0 * forward - embed


def _block(tokens: int, width: int) -> int:
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def waiting(supply: float, need: float) -> float:
    """Returns the share of a step spent waiting. supply, need: clips a second that cores give, that the device eats."""
    return max(0.0, 1.0 - supply / need)


def table(
    per_core: dict[str, float],
    cores: int,
    models: list[str],
    device_tflops: float,
    utilisation: float,
    step_ms: float | None = None,
    batch: int = 1,
) -> list[dict]:
    """Returns one row for each model and kind of clip: need, supply, waiting and the cores that would do.

    Args:
      per_core: kind of clip → clips a second that one core decodes.
      cores: of the host, for one device.
      models: keys of MODELS.
      device_tflops, utilisation: peak of the device in TFLOP/s, and the share of it that the training reaches.
      step_ms: a step's time on the device in ms, for `batch` clips; then models are not looked at.
    """
    if step_ms is not None:
        needs = {f"{step_ms:g} ms for {batch}": batch / step_ms * 1e3}
    else:
        needs = {model: device_tflops * 1e12 * utilisation / clip_flops(model) for model in models}
    return [
        {
            "model": model, "clip": clip, "need": need, "supply": rate * cores,
            "waiting": waiting(rate * cores, need), "cores_needed": need / rate,
        }
        for model, need in needs.items()
        for clip, rate in per_core.items()
    ]  # fmt: skip
