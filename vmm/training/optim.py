"""AdamW or Adafactor with warm-up and cosine, clipping, and ordered (regex, value) rules over parameter paths."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vmm.errors import UserError, one_of
from vmm.rules import first_matches
from vmm.settings import setting
from vmm.training.depth import layer_rates

Rules = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW (Loshchilov & Hutter 2019), or Adafactor (Shazeer & Stern 2018) as ViT-G is trained by (Zhai et al. 2022).

    Bias-only tuning (BitFit, Ben Zaken et al. 2022) is rate_rules=((".*/bias", 1.0), ("objective_.*", 1.0), (".*", 0.0)).
    """

    kind: str = setting(
        "adamw",
        "adamw or adafactor: the second moment of a matrix is a row and a column, each update is clipped to a "
        "root mean square of 1 (eq. 8), and the first moment is of what comes out.",
    )
    moments: str = setting(
        "float32",
        "float32 or bfloat16, what the first moment is kept in; the second stays float32: a decay above 0.996 "
        "would never move a bfloat16 number.",
    )
    offload: bool = setting(False, "Moments lie in the host's memory between steps (GPU and TPU).")
    learning_rate: float = setting(1e-3, "Peak of the schedule.")
    warmup: int = setting(0, "Steps of linear rise from 0; a cosine follows.")
    final: float = setting(0.0, "The rate at the last step, as a share of the peak.")
    b1: float = setting(0.9, "Decay of the first moment.")
    b2: float = setting(0.95, "Decay of the second moment.")
    epsilon: float = setting(1e-8, "Added to the root of the second moment.")
    weight_decay: float = setting(0.05, "Decoupled weight decay, times the learning rate.")
    clip: float = setting(1.0, "Largest global norm of the gradient; 0: not clipped.")
    ema: float = setting(0.0, "Decay of the running average of parameters; 0: none.")
    ema_end: float = setting(
        0.0,
        "The average's decay changes evenly to this by the last step (V-JEPA's teacher, 0.998 to 1); 0: it stays.",
    )
    accumulate: int = setting(1, "Parts a batch is computed in: memory for time, the result is the same.")
    layer_decay: float = setting(1.0, "Each layer's rate is this times that of the layer above it; 1: all the same.")
    rate_rules: Rules = setting(
        ((".*", 1.0),),
        "Ordered (regex, multiplier of the rate) over parameter paths; the first that matches counts; 0 "
        "freezes: no gradient, no decay, no moments.",
    )
    decay_rules: Rules = setting(
        ((".*/kernel", 1.0), (".*", 0.0)),
        "Ordered (regex, multiplier of the weight decay) over parameter paths; the first that matches counts.",
    )


def path_of(keys: tuple) -> str:
    """Returns a tree path as "a/b/c"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)


def match(rules: Rules, params, where: str):
    """Returns the tree of values that the rules give to the parameters, by first full match.

    Raises:
      UserError: a parameter that no rule matches, a rule that matches no parameter, a bad regex.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = first_matches(rules, paths, where, paths[:3], whole=True)
    return jax.tree_util.tree_map_with_path(lambda keys, _: found[path_of(keys)], params)


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Returns step → learning rate; counted in optimizer steps, 0 for the first."""
    if optim.warmup >= steps:
        raise UserError(f"optim.warmup: {optim.warmup} steps leave nothing of the run's {steps}")
    return optax.warmup_cosine_decay_schedule(
        0.0 if optim.warmup else optim.learning_rate,
        optim.learning_rate,
        optim.warmup,
        steps,
        optim.final * optim.learning_rate,
    )


def _scale(values) -> optax.GradientTransformation:
    """Multiplies each update by its own number."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, v: u * v, updates, values))


def _decay(rate: float, values) -> optax.GradientTransformation:
    """Adds rate · value · parameter to each update: AdamW's decoupled decay."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, p, v: u + rate * v * p if v else u, updates, params, values)
    )


def _moments(optim: Optim) -> optax.GradientTransformation:
    """Returns what turns a gradient into an update of about unit size.

    Raises:
      UserError: an unknown kind or type.
    """
    if optim.moments not in ("float32", "bfloat16"):
        raise UserError(f"optim.moments: must be float32 or bfloat16, got {optim.moments!r}")
    kind = jnp.dtype(optim.moments)
    if optim.kind == "adamw":
        return optax.scale_by_adam(optim.b1, optim.b2, optim.epsilon, mu_dtype=kind)
    if optim.kind == "adafactor":
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
            optax.clip_by_block_rms(1.0),
            optax.ema(optim.b1, debias=True, accumulator_dtype=kind) if optim.b1 else optax.identity(),
        )
    raise UserError(f"optim.kind: unknown {optim.kind!r}; {one_of(optim.kind, ('adafactor', 'adamw'))}")


def trainable(optim: Optim, params):
    """Returns a tree of bools: False where a rate rule of 0 freezes the parameter."""
    return jax.tree.map(lambda rate: rate != 0, match(optim.rate_rules, params, "optim.rate_rules"))


def make_optimizer(optim: Optim, params, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer for these parameters (arrays or shapes).

    Order: clip → moments → decay → rate multiplier → schedule; frozen parameters get no update and
    have no moments, and do not count in the norm that is clipped.

    Raises:
      UserError: as `match` and `schedule`.
    """
    params = nn.unbox(params)
    rates = match(optim.rate_rules, params, "optim.rate_rules")
    decays = match(optim.decay_rules, params, "optim.decay_rules")
    free = jax.tree.map(lambda rate: rate != 0, rates)
    if not 0 < optim.layer_decay <= 1:
        raise UserError(f"optim.layer_decay: above 0 and at most 1, got {optim.layer_decay}")
    if optim.layer_decay != 1:
        layers = layer_rates(optim.layer_decay, params)
        rates = jax.tree.map(lambda rate, layer: np.float32(rate * layer), rates, layers)
    if not any(jax.tree.leaves(free)):
        raise UserError("optim.rate_rules: every parameter is frozen; give some a rate above 0")
    masked = lambda values: jax.tree.map(lambda v, f: v if f else optax.MaskedNode(), values, free)  # noqa: E731
    chain = optax.chain(
        optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity(),
        _moments(optim),
        _decay(optim.weight_decay, masked(decays)),
        _scale(masked(rates)),
        optax.scale_by_learning_rate(schedule(optim, steps)),
    )
    labels = jax.tree.map(lambda f: "train" if f else "frozen", free)
    return optax.partition({"train": chain, "frozen": optax.set_to_zero()}, labels)


def ema_decay(optim: Optim, step, steps: int):
    """Returns the decay at a step of `steps`: ema + (ema_end − ema) · step / steps."""
    if not optim.ema_end:
        return optim.ema
    return optim.ema + (optim.ema_end - optim.ema) * step.astype(jnp.float32) / steps


def ema_update(ema, params, decay, step):
    """Returns the moved average: d · ema + (1 − d) · params, d = min(decay, (1 + step) / (10 + step)).

    The ramp (as in Polyak averaging of short runs) keeps the random start out of short averages.
    """
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
