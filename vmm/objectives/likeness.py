"""How like two pictures are: what pixel decoders are trained for, and what their pictures are scored by."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CEILING = 100.0  # decibels of pictures that are the same: their true ratio is infinite
_HIGHEST = jax.lax.Precision.HIGHEST


def charbonnier(prediction: Float[Array, "*B P"], target: Float[Array, "*B P"], epsilon: float = 1e-3) -> Array:
    """Returns the mean of √(d² + ε²) over a patch's values [*B] (Charbonnier et al. 1994): |d|, but smooth at 0."""
    return jnp.sqrt(jnp.square(prediction - target) + epsilon**2).mean(-1)


def psnr(one: Float[Array, "*B H W C"], other: Float[Array, "*B H W C"], peak: float = 255.0) -> Float[Array, "*B"]:
    """Returns 10 log10(peak² / mean squared difference) of two pictures, in decibels; CEILING where they are the same."""
    return decibels(jnp.square(one - other).mean((-3, -2, -1)), peak)


def decibels(squared: Float[Array, "*B"], peak: float = 255.0) -> Float[Array, "*B"]:
    """Returns the peak signal-to-noise ratio of a mean squared error, at most CEILING."""
    return -10.0 * jnp.log10(jnp.maximum(squared / peak**2, 10 ** (-CEILING / 10)))


def ssim(
    one: Float[Array, "*B H W C"],
    other: Float[Array, "*B H W C"],
    peak: float = 255.0,
    window: int = 11,
    deviation: float = 1.5,
) -> Float[Array, "*B"]:
    """Returns the structural similarity of two pictures, 1 where they are the same (Wang et al. 2004, eq. 13–16).

    Means, variances and covariances under a Gaussian window that lies whole in the picture, K1 = 0.01, K2 = 0.03; each
    colour by itself, and the mean of all. Of a picture smaller than the window the largest odd one that fits.
    FLOPs a picture: 10 products by band matrices, 10 H W C (H + W), at most.
    """
    height, width = one.shape[-3:-1]
    window = min(window, height - 1 + height % 2, width - 1 + width % 2)
    rows, columns = (_band(size, window, deviation) for size in (height, width))

    def blur(x):
        x = jnp.einsum("...hwc,hi->...iwc", x, rows, precision=_HIGHEST)
        return jnp.einsum("...iwc,wj->...ijc", x, columns, precision=_HIGHEST)

    first, second = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    # Of deviations from the middle of the range: less is lost where variances are differences.
    one, other = one - peak / 2, other - peak / 2
    mean_one, mean_other = blur(one), blur(other)
    variances = blur(one * one) - mean_one**2 + blur(other * other) - mean_other**2
    covariance = blur(one * other) - mean_one * mean_other
    mean_one, mean_other = mean_one + peak / 2, mean_other + peak / 2
    bright = (2 * mean_one * mean_other + first) / (mean_one**2 + mean_other**2 + first)
    return (bright * (2 * covariance + second) / (variances + second)).mean((-3, -2, -1))


def _band(size: int, window: int, deviation: float) -> np.ndarray:
    """Returns float32 [size, size − window + 1]: column i holds the Gaussian window over places i … i + window − 1."""
    weights = np.exp(-0.5 * ((np.arange(window) - (window - 1) / 2) / deviation) ** 2)
    band = np.zeros((size, size - window + 1), np.float32)
    for i in range(band.shape[1]):
        band[i : i + window, i] = weights / weights.sum()
    return band


def edge_error(one: Float[Array, "*B H W C"], other: Float[Array, "*B H W C"]) -> Float[Array, "*B"]:
    """Returns the mean absolute difference of two pictures' steps between neighbours, down and across (Mathieu et al. 2016)."""
    difference = one - other
    down, across = jnp.diff(difference, axis=-3), jnp.diff(difference, axis=-2)
    return 0.5 * (jnp.abs(down).mean((-3, -2, -1)) + jnp.abs(across).mean((-3, -2, -1)))
