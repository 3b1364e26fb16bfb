"""Augmentation on the device: Batch → Batch, and spectrogram → spectrogram, from one key a sample.

A sample's key is of (seed, step, its place in the run): the same on any mesh, host or worker. What
only chooses bytes (window, crop, flip, phrasing) is done where they are decoded (vmm/data/samples.py).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, UInt8

from vmm.settings import setting
from vmm.types import Batch, Mixed, Patches

# Brightness of red, green, blue, and two axes of colour: YIQ.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
# Streams of randomness: one option never moves another's numbers.
_COLOUR, _GAIN, _SPECTROGRAM, _MIXUP = range(1, 5)
_CUTMIX, _EITHER = range(8, 10)  # MixUp draws from one stream a modality


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Bands of the log-mel spectrogram that are set to its mean (Park et al. 2019); a width is uniform from 0."""

    time_masks: int = setting(2, "Bands of time.")
    time_width: int = setting(40, "Frames of one, at most.")
    mel_masks: int = setting(2, "Bands of frequency.")
    mel_width: int = setting(24, "Bins of one, at most.")


@dataclasses.dataclass(frozen=True)
class MixUp:
    """Samples mixed with others of the batch, and their labels too (Zhang et al. 2018)."""

    alpha: float = setting(0.8, "Shares are drawn from Beta(alpha, alpha), one a sample.")
    modalities: tuple[str, ...] = setting(("video", "audio"), "Those mixed; of video and audio.")
    together: bool = setting(
        True,
        "One partner and share for all modalities (mixed across them); else each has its own (within).",
    )


@dataclasses.dataclass(frozen=True)
class CutMix:
    """A box of another sample's video in the place of the own, and its label by the share of pixels (Yun et al. 2019)."""

    alpha: float = setting(
        1.0,
        "The share of the box, before the clip's edges cut it, is drawn from Beta(alpha, alpha), one a sample.",
    )
    time: bool = setting(False, "The box ends in time too; else it is the same in all frames.")


def draw(keys: Array, stream: int, shape: tuple = (), low: float = 0.0, high: float = 1.0) -> Array:
    """Returns uniform numbers float32 [B, *shape] of one stream of each sample's randomness."""
    mine = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=low, maxval=high))(mine)


def augment(
    batch: Batch, keys: Array, colour: float, gain: float, mixup: MixUp | None, cutmix: CutMix | None = None
) -> Batch:
    """Returns the batch with colour, loudness and mixing drawn anew for each sample.

    Args:
      keys: one a sample [B]. colour: strength of the change of colour, see jitter_colour; 0: none.
      gain: sound is made louder or softer by up to so many decibels. mixup, cutmix: see these; with both, each sample has
        one of them, evenly drawn.
    """
    inputs = dict(batch.inputs)
    if colour:
        inputs["video"] = jitter_colour(inputs["video"], *colour_factors(keys, colour))
    if gain:
        decibels = draw(keys, _GAIN, (), -gain, gain)
        inputs["audio"] = jnp.clip(inputs["audio"] * 10 ** (decibels / 20)[:, None], -1.0, 1.0)
    batch = batch._replace(inputs=inputs)
    if mixup and cutmix:
        return either(draw(keys, _EITHER) < 0.5, mix(batch, keys, mixup), cut(batch, keys, cutmix))
    if cutmix:
        return cut(batch, keys, cutmix)
    return mix(batch, keys, mixup) if mixup else batch


def add_noise(patches: Patches, keys: Array, deviation: float) -> Patches:
    """Returns the patches with Gaussian noise on every value: of pixels as a share of their range, then bytes again.

    The pixels are those of corrupt.add_noise, but the draws are of `keys`, one a sample [B]. The draws of a sample depend
    on how many patches it has.
    """
    values = patches.values
    noise = deviation * jax.vmap(lambda key: jax.random.normal(key, values.shape[1:]))(keys)
    if values.dtype == jnp.uint8:
        noisy = jnp.clip(jnp.round(values + 255.0 * noise), 0, 255).astype(jnp.uint8)
    else:
        noisy = values + noise
    return patches._replace(values=noisy)


def colour_factors(keys: Array, strength: float) -> tuple[Array, Array, Array, Array]:
    """Returns brightness, contrast and saturation factors, 1 ± 0.8 strength, and turns of hue, ± 0.2 strength; each [B].

    The ranges of SimCLR (Chen et al. 2020) at strength 1.
    """
    unit = draw(keys, _COLOUR, (4,), -1.0, 1.0) * strength
    factors = jnp.maximum(0.0, 1 + 0.8 * unit[:, :3])
    return factors[:, 0], factors[:, 1], factors[:, 2], 0.2 * unit[:, 3]


def jitter_colour(
    video: UInt8[Array, "B T H W 3"],
    brightness: Float[Array, " B"],
    contrast: Float[Array, " B"],
    saturation: Float[Array, " B"],
    hue: Float[Array, " B"],
) -> UInt8[Array, "B T H W 3"]:
    """Returns the video with colours changed, alike in all frames of a sample.

    In this order: times brightness; away from the clip's mean grey by contrast; away from each pixel's grey by
    saturation; colour turned by `hue` of a full turn in YIQ. All are linear, so one 3 × 3 matrix and one
    offset a sample do it; values are cut to [0, 255] once, at the end.
    """
    yiq = jnp.asarray(_YIQ)
    grey = jnp.broadcast_to(yiq[0], (3, 3))  # every output channel is the brightness
    eye = jnp.eye(3)
    turn = 2 * math.pi * hue
    zero, one = jnp.zeros_like(turn), jnp.ones_like(turn)
    cosine, sine = jnp.cos(turn), jnp.sin(turn)
    rotation = jnp.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], -1).reshape(-1, 3, 3)
    hued = jnp.linalg.inv(yiq) @ rotation @ yiq
    saturated = saturation[:, None, None] * eye + (1 - saturation)[:, None, None] * grey
    matrix = hued @ saturated * (brightness * contrast)[:, None, None]
    pixels = video.astype(jnp.float32)
    mean = pixels.mean((1, 2, 3)) @ yiq[0]
    offset = (1 - contrast) * brightness * mean  # grey stays grey under the other two
    pixels = jnp.einsum("bthwc,bdc->bthwd", pixels, matrix) + offset[:, None, None, None, None]
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def spec_augment(
    patches: Patches, patch: tuple[int, int], keys: Array, spec: SpecAugment, stride: tuple[int, int] | None = None
) -> Patches:
    """Returns spectrogram patches float32 [B (f m) P] with bands set to zero, the mean of standardised values.

    patch: (frames, bins) of one patch. stride: the same from one patch to the next, None: the patch.
    A band goes across patches: it is cut in the whole spectrogram.
    """
    stride, grid = stride or patch, (*patches.grid, 1)[:2]
    row, column = (np.arange(count)[:, None] * step + np.arange(size) for count, step, size in zip(grid, stride, patch))
    frames, bins = int(row.max()) + 1, int(column.max()) + 1
    count = spec.time_masks + spec.mel_masks
    width, place = jnp.moveaxis(draw(keys, _SPECTROGRAM, (2, count)), 1, 0)

    def outside(size: int, widest: int, width: Array, place: Array) -> Bool[Array, "B size"]:
        wide = jnp.floor(width * (min(widest, size) + 1))
        first = jnp.floor(place * (size - wide + 1))
        at = jnp.arange(size)
        inside = (at >= first[..., None]) & (at < (first + wide)[..., None])
        return ~inside.any(1)

    split = spec.time_masks
    times = outside(frames, spec.time_width, width[:, :split], place[:, :split])
    mels = outside(bins, spec.mel_width, width[:, split:], place[:, split:])
    keep = times[:, row][:, :, None, :, None] & mels[:, column][:, None, :, None]
    keep = rearrange(keep, "b f m p q -> b (f m) (p q)")
    return patches._replace(values=jnp.where(keep, patches.values, 0.0))


def mix(batch: Batch, keys: Array, mixup: MixUp) -> Batch:
    """Returns the batch with every input of mixup.modalities mixed with a partner's, and batch.mixed told.

    x ← (1 - s) x + s x', for the share s of the partner. Partners are fixed by place (the batch mirrored; for a second
    modality of its own also turned by half): order is random already, and no device gathers the whole batch.
    A stream that either lacks is left as it is. A sample's label shares are the means over its mixed streams that
    are present.
    """
    size = batch.index.shape[0]
    alpha = jnp.full((), mixup.alpha)
    inputs, partners, shares = dict(batch.inputs), [], []
    present = sum(batch.present[name].astype(jnp.float32) for name in mixup.modalities)
    for number, name in enumerate(mixup.modalities):
        own = 0 if mixup.together else number

        def partner(x, own=own):
            x = jnp.flip(x, 0)
            return jnp.roll(x, size // 2, 0) if own else x

        mine = jax.vmap(jax.random.fold_in, (0, None))(keys, _MIXUP + own)
        share = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(mine)
        share = jnp.where(batch.present[name] & partner(batch.present[name]), share, 0.0)
        there = inputs[name]
        part = share.reshape(-1, *(1,) * (there.ndim - 1))
        mixed = (1 - part) * there.astype(jnp.float32) + part * partner(there).astype(jnp.float32)
        inputs[name] = jnp.round(mixed).astype(there.dtype) if there.dtype == jnp.uint8 else mixed
        partners.append({label: partner(values) for label, values in batch.labels.items()})
        shares.append(share / jnp.maximum(present, 1.0))
    labels = {name: jnp.stack([labels[name] for labels in partners], 1) for name in batch.labels}
    return batch._replace(inputs=inputs, mixed=Mixed(labels, jnp.stack(shares, 1)))


def cut(batch: Batch, keys: Array, cutmix: CutMix) -> Batch:
    """Returns the batch with a box of each video taken from its partner's, and batch.mixed told.

    Of a box of share r, each side is the clip's times √r (of space-time, ∛r), rounded to whole pixels or
    frames; its middle is uniform, and what lies outside the clip is cut off. The partner's share is exactly that of the
    pixels that are its own. Partners as in mix; where either has no video nothing is taken. The sound stays.
    """
    video = batch.inputs["video"]
    sides = video.shape[1:4] if cutmix.time else video.shape[2:4]
    mine = jax.vmap(jax.random.fold_in, (0, None))(keys, _CUTMIX)
    alpha = jnp.full((), cutmix.alpha)
    whole = jax.vmap(lambda key: jax.random.beta(jax.random.fold_in(key, 0), alpha, alpha))(mine)
    middle = draw(mine, 1, (len(sides),))
    inside = jnp.ones((len(video), *(1,) * len(sides)), bool)
    for axis, size in enumerate(sides):
        side = jnp.round(size * whole ** (1 / len(sides))).astype(jnp.int32)
        low = jnp.floor(middle[:, axis] * size).astype(jnp.int32) - side // 2
        place = jnp.arange(size)
        there = (place >= low[:, None]) & (place < (low + side)[:, None])
        inside &= there.reshape(-1, *(size if i == axis else 1 for i in range(len(sides))))
    inside &= (batch.present["video"] & jnp.flip(batch.present["video"])).reshape(-1, *(1,) * len(sides))
    share = inside.sum(tuple(range(1, inside.ndim))) / np.float32(math.prod(sides))
    inside = inside[..., None] if cutmix.time else inside[:, None, :, :, None]
    inputs = dict(batch.inputs) | {"video": jnp.where(inside, jnp.flip(video, 0), video)}
    labels = {name: jnp.flip(values, 0)[:, None] for name, values in batch.labels.items()}
    return batch._replace(inputs=inputs, mixed=Mixed(labels, share[:, None]))


def either(first: Bool[Array, " B"], one: Batch, two: Batch) -> Batch:
    """Returns each sample as in `one` where `first`, else as in `two`: inputs, and the shares of all their partners."""

    def choose(x, y):
        return x if x is y else jnp.where(first.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    inputs = {name: choose(one.inputs[name], two.inputs[name]) for name in one.inputs}
    labels = {name: jnp.concatenate([one.mixed.labels[name], two.mixed.labels[name]], 1) for name in one.labels}
    mine = first[:, None]
    share = jnp.concatenate([jnp.where(mine, one.mixed.share, 0.0), jnp.where(mine, 0.0, two.mixed.share)], 1)
    return one._replace(inputs=inputs, mixed=Mixed(labels, share))
