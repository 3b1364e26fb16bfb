"""Loss arithmetic: arrays → scalar, pure, in float32. No parameters, no modules."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mean(values: Float[Array, "*B"], weight: Array) -> Float[Array, ""]:
    """Returns Σ weight · value / Σ weight, 0 where all weight is 0. Values of weight 0 may be anything finite."""
    weight = weight.astype(jnp.float32)
    total = weight.sum()
    return (values * weight).sum() / jnp.where(total > 0, total, 1.0)


def normalise(x: Float[Array, "*B E"], epsilon: float = 1e-6) -> Float[Array, "*B E"]:
    """Returns x / ‖x‖ along the last axis; safe, with a finite gradient, at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), epsilon**2))


def cross_entropy(logits: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns −log softmax(logits)[label]; labels outside [0, V) count as class 0: weigh them out."""
    labels = jnp.where((labels >= 0) & (labels < logits.shape[-1]), labels, 0)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), labels[..., None], axis=-1)[
        ..., 0
    ]


def contrastive_softmax(
    first: Float[Array, "B E"], second: Float[Array, "B E"], valid: Bool[Array, "B"], scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Symmetric InfoNCE of unit embeddings (CLIP, Radford et al. 2021, fig. 3), over the valid pairs.

        ½ mean_i [ −log softmax_j(s a_i·b_j)_i  −log softmax_j(s b_i·a_j)_i ]

    Rows that are not valid are neither queries nor negatives.
    """
    logits = scale * first @ second.T
    logits = jnp.where(valid[:, None] & valid[None, :], logits, -1e30)
    own = jnp.arange(len(logits))
    rows = cross_entropy(logits, own)
    columns = cross_entropy(logits.T, own)
    return 0.5 * mean(jnp.where(valid, rows + columns, 0.0), valid)


def contrastive_sigmoid(
    first: Float[Array, "B E"],
    second: Float[Array, "B E"],
    valid: Bool[Array, "B"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, ""]:
    """Pairwise sigmoid loss of unit embeddings (SigLIP, Zhai et al. 2023, eq. 1), over the valid pairs.

    −(1/n) Σ_i Σ_j log σ(z_ij (s a_i·b_j + bias)),  z_ij = 1 where i = j, else −1
    """
    logits = scale * first @ second.T + bias
    sign = 2.0 * jnp.eye(len(logits)) - 1.0
    terms = -jax.nn.log_sigmoid(sign * logits)
    return jnp.where(valid[:, None] & valid[None, :], terms, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def standardise(patches: Float[Array, "*B P"], epsilon: float = 1e-6) -> Float[Array, "*B P"]:
    """Returns each patch with mean 0 and variance 1: the targets of masked autoencoders (He et al. 2022)."""
    centred = patches - patches.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def squared_error(prediction: Float[Array, "*B P"], target: Float[Array, "*B P"]) -> Float[Array, "*B"]:
    """Returns the mean squared error of each patch."""
    return jnp.square(prediction.astype(jnp.float32) - target).mean(-1)
