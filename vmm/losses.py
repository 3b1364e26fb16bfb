"""Loss arithmetic: arrays → scalar, pure, in float32. No parameters, no modules."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmm.sharding import batch_parts, constrain


def mean(values: Float[Array, "*B"], weight: Array) -> Float[Array, ""]:
    """Returns Σ weight · value / Σ weight, 0 where all weight is 0. Values of weight 0 may be anything finite."""
    weight = weight.astype(jnp.float32)
    total = weight.sum()
    return (values * weight).sum() / jnp.where(total > 0, total, 1.0)


def normalise(x: Float[Array, "*B E"], epsilon: float = 1e-6) -> Float[Array, "*B E"]:
    """Returns x / ‖x‖ along the last axis; safe, with a finite gradient, at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), epsilon**2))


def cross_entropy(logits: Float[Array, "*B V"], labels: Int[Array, "*B"], smoothing: float = 0.0) -> Float[Array, "*B"]:
    """Returns −log softmax(logits)[label]; labels outside [0, V) count as class 0: weigh them out.

    smoothing: share ε of the target that is even over all V classes (Szegedy et al. 2016, sec. 7).
    """
    labels = jnp.where((labels >= 0) & (labels < logits.shape[-1]), labels, 0)
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    error = -jnp.take_along_axis(logs, labels[..., None], axis=-1)[..., 0]
    return (1 - smoothing) * error - smoothing * logs.mean(-1) if smoothing else error


def binary_cross_entropy(logits: Float[Array, "*B"], truth: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns −[t ln σ(z) + (1 − t) ln(1 − σ(z))] of each logit z by itself; truth t in [0, 1]."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * truth


def focal(
    logits: Float[Array, "*B Y"], target: Float[Array, "*B Y"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "*B Y"]:
    """Returns −α_t (1 − p_t)^γ ln p_t of sigmoids (Lin et al. 2017, eq. 5), p_t the chance of what is so.

    target: 1 or 0. α_t is α where it is 1, 1 − α where it is 0.
    """
    sign = jnp.where(target > 0, 1.0, -1.0)
    signed = sign * logits.astype(jnp.float32)
    weight = jnp.where(target > 0, alpha, 1 - alpha)
    return -weight * jnp.exp(gamma * jax.nn.log_sigmoid(-signed)) * jax.nn.log_sigmoid(signed)


def divergence(one: Float[Array, "*B V"], other: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Returns KL(p ‖ q) = Σ p (ln p − ln q) of logarithms of probabilities, ln p and ln q."""
    return (jnp.exp(one) * (one - other)).sum(-1)


def contrastive_softmax(
    first: Float[Array, "B E"],
    second: Float[Array, "B E"],
    valid: Bool[Array, "B"],
    scale: Float[Array, ""],
    chunk: int = 0,
    past: tuple | None = None,
) -> Float[Array, ""]:
    """Symmetric InfoNCE of unit embeddings (CLIP, Radford et al. 2021, fig. 3), over the valid pairs.

        ½ mean_i [ −log softmax_j(s a_i·b_j)_i  −log softmax_j(s b_i·a_j)_i ]

    Rows that are not valid are neither queries nor negatives. chunk: how many of the other side's rows a device looks
    at at a time: it then holds [B / devices, chunk] logits and never [B / devices, B], and makes them twice more for
    the gradient; the same value and gradient. 0: all at once. past: (first [Q E], second [Q E], valid [Q]), further
    negatives, never with chunk. FLOPs forward: 2 B² E, chunked 4 B² E; with a past 2 B (B + 2 Q) E.
    """
    if chunk:
        return _softmax_chunked(first, second, valid, scale, chunk)
    logits = scale * first @ second.T
    logits = jnp.where(valid[:, None] & valid[None, :], logits, -1e30)
    own = jnp.arange(len(logits))
    of_rows, of_columns = logits, logits.T
    if past is not None:
        old_first, old_second, there = past
        of_rows = jnp.concatenate([of_rows, jnp.where(there, scale * first @ old_second.T, -1e30)], axis=1)
        of_columns = jnp.concatenate([of_columns, jnp.where(there, scale * second @ old_first.T, -1e30)], axis=1)
    rows, columns = cross_entropy(of_rows, own), cross_entropy(of_columns, own)
    return 0.5 * mean(jnp.where(valid, rows + columns, 0.0), valid)


def contrastive_sigmoid(
    first: Float[Array, "B E"],
    second: Float[Array, "B E"],
    valid: Bool[Array, "B"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    chunk: int = 0,
    past: tuple | None = None,
) -> Float[Array, ""]:
    """Pairwise sigmoid loss of unit embeddings (SigLIP, Zhai et al. 2023, eq. 1), over the valid pairs.

    −(1/n) Σ_i Σ_j log σ(z_ij (s a_i·b_j + bias)),  z_ij = 1 where i = j, else −1

    chunk, past: as in contrastive_softmax. FLOPs forward: 2 B² E; with a past 2 B (B + 2 Q) E.
    """
    if chunk:
        return _sigmoid_chunked(first, second, valid, scale, bias, chunk)
    logits = scale * first @ second.T + bias
    sign = 2.0 * jnp.eye(len(logits)) - 1.0
    terms = -jax.nn.log_sigmoid(sign * logits)
    total = jnp.where(valid[:, None] & valid[None, :], terms, 0.0).sum()
    if past is not None:
        old_first, old_second, there = past
        for mine, old in ((first, old_second), (second, old_first)):
            terms = -jax.nn.log_sigmoid(-(scale * mine @ old.T + bias))
            total += jnp.where(valid[:, None] & there[None, :], terms, 0.0).sum()
    return total / jnp.maximum(valid.sum(), 1)


def _cut(x: Array, chunk: int) -> Array:
    """Returns [B ...] as chunks [C P m ...] of P · m rows, about `chunk`, an equal share from each of P devices.

    So a chunk is gathered when its turn comes, and none of the batch before. What fills up the last is zero.
    """
    parts = batch_parts(len(x))
    local = len(x) // parts
    share = min(local, max(1, chunk // parts))
    count = -(-local // share)
    x = x.reshape(parts, local, *x.shape[1:])
    x = jnp.pad(x, ((0, 0), (0, count * share - local), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(parts, count, share, *x.shape[2:]).swapaxes(0, 1)
    return constrain(x, None, "batch", *(None,) * (x.ndim - 2))


def _scan(step, start, mine: Array, theirs: Array, valid: Array, chunk: int, stats: tuple = ()):
    """Folds step(carry, logits [B m], own [B m], seen [B m], their x [m E], their stats) → carry over the chunks.

    own: where the two rows are one sample. seen: where both are valid. stats: further arrays [B ...] of theirs.
    """
    place = jnp.arange(len(mine))

    def body(carry, other):
        x, there, at, *stats = (part.reshape(-1, *part.shape[2:]) for part in other)
        x = constrain(x, None, None)
        logits = constrain(mine @ x.T, "batch", None)
        # What fills up a chunk has the place −1 and is nobody's own.
        return step(carry, logits, place[:, None] == at - 1, valid[:, None] & there, x, stats), None

    start = jax.tree.map(lambda leaf: constrain(leaf, "batch", *(None,) * (leaf.ndim - 1)), start)
    others = tuple(_cut(array, chunk) for array in (theirs, valid, place + 1, *stats))
    return jax.lax.scan(body, start, others)[0]


def _row_sums(mine, theirs, valid, chunk):
    """Returns of each row of logits the maximum, Σ exp(logit − maximum), and its own logit; each [B]."""

    def step(carry, logits, own, seen, x, stats):
        top, total, mine = carry
        logits = jnp.where(seen, logits, -1e30)
        higher = jnp.maximum(top, logits.max(1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(1)
        return higher, total, mine + jnp.where(own, logits, 0.0).sum(1)

    blank = jnp.zeros(len(mine), jnp.float32)
    return _scan(step, (blank - 1e30, blank, blank), mine, theirs, valid, chunk)


def _pull(weigh, mine, theirs, valid, chunk, stats=()):
    """Returns Σ_j w_ij x_j [B E] and Σ_j w_ij [B], w = weigh(logits, own, their stats): what a row's gradient is made of.

    Each device makes the gradient of its own rows, of either side: no sums go between devices.
    """

    def step(carry, logits, own, seen, x, stats):
        total, count = carry
        weight = jnp.where(seen, weigh(logits, own, *stats), 0.0)
        return total + weight @ x, count + weight.sum(1)

    start = jnp.zeros_like(mine), jnp.zeros(len(mine), jnp.float32)
    return _scan(step, start, mine, theirs, valid, chunk, stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _softmax_chunked(first, second, valid, scale, chunk):
    return _softmax_forward(first, second, valid, scale, chunk)[0]


def _softmax_forward(first, second, valid, scale, chunk):
    scaled = scale * first  # before the product, on either way: logits of rows and columns are then the same numbers
    rows = _row_sums(scaled, second, valid, chunk)
    columns = _row_sums(second, scaled, valid, chunk)
    error = sum((top - own) + jnp.log(total) for top, total, own in (rows, columns))
    value = 0.5 * mean(jnp.where(valid, error, 0.0), valid)
    return value, (first, second, valid, scale, rows[:2], columns[:2])


def _softmax_backward(chunk, saved, gradient):
    first, second, valid, scale, rows, columns = saved
    scaled, each = scale * first, 0.5 * gradient / jnp.maximum(valid.sum(), 1)

    def pull(mine, theirs, my_sums, their_sums):
        def weigh(logits, own, top, total):
            # Rows that are not valid have no sums: what they make of them is weighed out, but must be finite.
            of_mine = jnp.exp(jnp.minimum(logits - my_sums[0][:, None], 0.0)) / my_sums[1][:, None]
            of_theirs = jnp.exp(jnp.minimum(logits - top, 0.0)) / jnp.maximum(total, 1e-30)
            return each * ((of_mine - own) + (of_theirs - own))

        return _pull(weigh, mine, theirs, valid, chunk, their_sums)[0]

    to_first, to_second = pull(scaled, second, rows, columns), pull(second, scaled, columns, rows)
    return scale * to_first, to_second, None, (first * to_first).sum()


_softmax_chunked.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sigmoid_chunked(first, second, valid, scale, bias, chunk):
    return _sigmoid_forward(first, second, valid, scale, bias, chunk)[0]


def _sigmoid_forward(first, second, valid, scale, bias, chunk):
    def step(total, logits, own, seen, x, stats):
        terms = -jax.nn.log_sigmoid((2.0 * own - 1.0) * (logits + bias))
        return total + jnp.where(seen, terms, 0.0).sum(1)

    total = _scan(step, jnp.zeros(len(first), jnp.float32), scale * first, second, valid, chunk)
    return total.sum() / jnp.maximum(valid.sum(), 1), (first, second, valid, scale, bias)


def _sigmoid_backward(chunk, saved, gradient):
    first, second, valid, scale, bias = saved
    scaled, each = scale * first, gradient / jnp.maximum(valid.sum(), 1)

    def weigh(logits, own):
        sign = 2.0 * own - 1.0
        return -each * sign * jax.nn.sigmoid(-sign * (logits + bias))

    to_first, count = _pull(weigh, scaled, second, valid, chunk)
    to_second, _ = _pull(weigh, second, scaled, valid, chunk)
    return scale * to_first, to_second, None, (first * to_first).sum(), count.sum()


_sigmoid_chunked.defvjp(_sigmoid_forward, _sigmoid_backward)


def standardise(patches: Float[Array, "*B P"], epsilon: float = 1e-6, less: int = 0) -> Float[Array, "*B P"]:
    """Returns each patch with mean 0 and variance 1: the targets of masked autoencoders (He et al. 2022).

    less: 1 for the unbiased variance, over P − 1, as its published code has it.
    """
    centred = patches - patches.mean(-1, keepdims=True)
    variance = jnp.square(centred).sum(-1, keepdims=True) / max(1, patches.shape[-1] - less)
    return centred * jax.lax.rsqrt(variance + epsilon)


def standardise_colours(patches: Float[Array, "*B P"], colours: int, epsilon: float = 1e-6) -> Float[Array, "*B P"]:
    """Returns each colour of each patch as (x − mean) / (deviation + ε), the deviation unbiased (VideoMAE, Tong et al. 2022).

    colours: neighbours in a patch's values are one pixel's colours.
    """
    x = patches.reshape(*patches.shape[:-1], -1, colours)
    centred = x - x.mean(-2, keepdims=True)
    variance = jnp.square(centred).sum(-2, keepdims=True) / max(1, x.shape[-2] - 1)
    # Under the root never zero: its gradient would not be finite.
    return (centred / (jnp.sqrt(jnp.maximum(variance, 1e-30)) + epsilon)).reshape(patches.shape)


def squared_error(prediction: Float[Array, "*B P"], target: Float[Array, "*B P"]) -> Float[Array, "*B"]:
    """Returns the mean squared error of each patch."""
    return jnp.square(prediction.astype(jnp.float32) - target).mean(-1)


def mean_error(features: Mapping) -> tuple[Float[Array, ""], dict]:
    """Returns (the mean over modalities, each modality's) mean error per item of the global batch.

    features: modality → {"error": [B] sums of a sample's errors, "count": [B] how many they are}.
    """
    means = {name: value["error"].sum() / jnp.maximum(value["count"].sum(), 1.0) for name, value in features.items()}
    return sum(means.values()) / len(means), means
