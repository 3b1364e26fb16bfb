"""The health panel: is a representation collapsing, who moves the model, do modalities meet?

Pure arithmetic in float32. Names are `health/<modality, pair or objective>/<what>`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

ROWS = 256  # of the global batch that rank and uniformity are of, the first ones


def effective_rank(x: Float[Array, "B D"], valid: Bool[Array, "B"]) -> Float[Array, ""]:
    """Returns exp(−Σ p ln p), p = σ / Σ σ, for the singular values σ of the centred valid rows (Roy & Vetterli 2007).

    Between 1 and min(D, rows − 1); 1 for features that are all the same. At most ROWS rows are taken.
    Singular values below float32's rounding of the features are none.
    """
    x, weight = x[:ROWS].astype(jnp.float32), valid[:ROWS].astype(jnp.float32)[:, None]
    count = jnp.maximum(weight.sum(), 1.0)
    raw = x * weight
    centred = (raw - raw.sum(0) / count) * weight
    # The smaller Gram matrix has all eigenvalues that are not zero.
    gram = centred.T @ centred if x.shape[1] < x.shape[0] else centred @ centred.T
    values = jnp.linalg.eigvalsh(gram)
    floor = 1e-6 * jnp.maximum(values[-1], 1e-6 * jnp.square(raw).sum())
    values = jnp.sqrt(jnp.where(values > floor, values, 0.0))
    share = values / jnp.maximum(values.sum(), 1e-30)
    return jnp.exp(-jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0).sum())


def deviation(x: Float[Array, "B D"], valid: Bool[Array, "B"]) -> Float[Array, "D"]:
    """Returns the standard deviation of each dimension over the valid rows."""
    x, weight = x.astype(jnp.float32), valid.astype(jnp.float32)[:, None]
    count = jnp.maximum(weight.sum(), 1.0)
    x = jnp.where(weight > 0, x, 0.0)
    mean = x.sum(0) / count
    return jnp.sqrt((jnp.square(x - mean) * weight).sum(0) / count)


def alignment(first: Float[Array, "B E"], second: Float[Array, "B E"], valid: Bool[Array, "B"]) -> Float[Array, ""]:
    """Returns the mean of ‖a_i − b_i‖² over the valid pairs of unit embeddings (Wang & Isola 2020, eq. 4, α = 2)."""
    weight = valid.astype(jnp.float32)
    return (jnp.square(first - second).sum(-1) * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def uniformity(x: Float[Array, "B E"], valid: Bool[Array, "B"]) -> Float[Array, ""]:
    """Returns ln mean exp(−2 ‖a_i − a_j‖²) over i ≠ j, of unit embeddings (Wang & Isola 2020, eq. 5, t = 2).

    0 where all are one point; below −3.5 where they are spread. At most ROWS rows are taken.
    """
    x, valid = x[:ROWS].astype(jnp.float32), valid[:ROWS]
    squares = jnp.square(x).sum(-1)
    distance = jnp.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0.0)
    both = valid[:, None] & valid[None] & ~jnp.eye(len(x), dtype=bool)
    return jnp.log(jnp.where(both, jnp.exp(-2 * distance), 0.0).sum() / jnp.maximum(both.sum(), 1))


def gap(first: Float[Array, "B E"], second: Float[Array, "B E"], valid: Bool[Array, "B"]) -> Float[Array, ""]:
    """Returns the distance of the means of two modalities' unit embeddings (modality gap, Liang et al. 2022, sec. 4)."""
    weight = valid.astype(jnp.float32)[:, None]
    return jnp.linalg.norm(((first - second) * weight).sum(0) / jnp.maximum(weight.sum(), 1.0))


def of_features(pooled: Mapping) -> dict:
    """Returns the ranks and deviations of features.

    pooled: "<modality>/<stage>" → (features [B D], valid [B]).
    """
    result = {}
    for name, (x, valid) in pooled.items():
        spread = deviation(x, valid)
        result[f"health/{name}_rank"] = effective_rank(x, valid)
        result[f"health/{name}_std"] = spread.mean()
        result[f"health/{name}_std_min"] = spread.min()
    return result


def of_pairs(pairs: Mapping) -> dict:
    """Returns alignment, uniformity (mean of both sides) and gap.

    pairs: "<one>-<two>" → (unit embeddings [B E], unit embeddings [B E], valid [B]).
    """
    result = {}
    for name, (first, second, valid) in pairs.items():
        result[f"health/{name}/alignment"] = alignment(first, second, valid)
        result[f"health/{name}/uniformity"] = (uniformity(first, valid) + uniformity(second, valid)) / 2
        result[f"health/{name}/gap"] = gap(first, second, valid)
    return result


def of_gates(gates: Mapping) -> dict:
    """Returns the mean of each gate: health/gates/<where in the model>.

    gates: collection "gates" as sown; layers of a scan, stacked on a first axis, are told apart.
    """
    result = {}
    for path, values in flatten_dict(gates).items():
        values = list(values) if isinstance(values, (tuple, list)) else [values]
        name = "/".join(part for part in path if part not in ("model", "blocks"))
        if "layers" in path:
            for i in range(values[0].shape[0]):
                mine = jnp.stack([value[i].astype(jnp.float32).mean() for value in values]).mean()
                result[f"health/gates/{name.replace('layers', f'layer_{i}', 1)}"] = mine
        else:
            result[f"health/gates/{name}"] = jnp.stack([value.astype(jnp.float32).mean() for value in values]).mean()
    return result


def shares(norms: Mapping) -> dict:
    """Returns each norm's share of their sum: health/<name>/gradient_share."""
    total = jnp.maximum(sum(norms.values()), 1e-30)
    return {f"health/{name}/gradient_share": value / total for name, value in norms.items()}


def of_gradient(gradient: Mapping) -> dict:
    """Returns the share of each encoder in the gradient: of the norms over its parameters.

    gradient: tree of a Recipe; encoders stand under model/encoder_<modality>.
    """
    trunk = gradient.get("model", {})
    encoders = {name: tree for name, tree in trunk.items() if name.startswith("encoder_")}
    return shares({name.removeprefix("encoder_"): optax.tree.norm(tree) for name, tree in encoders.items()})


def when(now: Array, measure, *operands) -> dict:
    """Returns measure(*operands) where `now`, else not-a-number for each; then nothing of it is computed."""
    operands = jax.lax.stop_gradient(operands)
    shapes = jax.eval_shape(measure, *operands)
    blank = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)
    return jax.lax.cond(now, measure, lambda *_: blank, *operands)
