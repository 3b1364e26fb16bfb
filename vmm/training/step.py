"""State, and the one train step: jit with shardings, the old state donated."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vmm.sharding import batch_sharding, compiler_options, in_device_memory, in_host_memory, place_state
from vmm.training.allocation import allocating
from vmm.training.guard import Guard, blank_watch, counted, judge, kept, layer_norms
from vmm.training.health import of_gradient, when
from vmm.training.optim import Optim, ema_decay, ema_update, make_optimizer, schedule, trainable


class State(NamedTuple):
    """All that a run carries from step to step.

    step: int32 []. params: float32 tree. optimizer: optax state. ema: as params, or () without. memory: objective → queue
    of past embeddings, {} without. guard: a Watch, () without.
    """

    step: Any
    params: Any
    optimizer: Any
    ema: Any
    memory: Any
    guard: Any = ()


class Program(NamedTuple):
    """A run, compiled on demand.

    shapes: State of ShapeDtypeStructs with their shardings. init: key → State.
    step: (state, batch) → (state, metrics); with `frozen` (state, batch, parameters of other models) → the same. Metrics
    are scalars; with a guard there is also `layers`, the norms of its parts' gradients.
    pass_over: state → state after a step that changed nothing.
    """

    shapes: State
    init: Callable
    step: Callable
    pass_over: Callable


def make_program(
    initialise: Callable,
    loss: Callable,
    optim: Optim,
    *,
    steps: int,
    seed: int,
    mesh: Mesh | None,
    health: int = 0,
    frozen: bool = False,
    memory: Mapping | None = None,
    guard: Guard | None = None,
    poison: tuple[int, ...] = (),
    adapt: tuple = (),
) -> Program:
    """Returns the run's program.

    Args:
      initialise: key → boxed parameters (as Linen's init gives, axes named).
      loss: (params, teacher, batch, key) → (scalar, metrics); it also takes `measure` and `frozen` where these are used.
      optim: see Optim. steps: of the whole run, for the schedule.
      seed: randomness of step t is from (seed, t) alone.
      mesh: where it runs; None: no shardings, for tracing.
      health: steps between measurements of the health panel, 0: none. frozen: whether other models teach this one.
      memory: objective → empty queue of past embeddings; where there are any, the loss takes them and gives them back.
      guard: when a step is to change nothing; None: never.
      poison: steps (the first is 1) whose loss is made not-a-number, to see what happens then (training/faults.py).
      adapt: of the config, for adapters whose ranks change while training (allocation.py).
    """
    boxed = jax.eval_shape(initialise, jax.random.key(0))
    optimizer = allocating(make_optimizer(optim, boxed, steps), adapt, nn.unbox(boxed), steps)
    rate = schedule(optim, steps)
    free = trainable(optim, nn.unbox(boxed))

    def init_boxed(key):
        params = initialise(key)
        # Moments mirror the parameters, boxes and all, and so get their shardings.
        return State(
            jnp.zeros((), jnp.int32), params, optimizer.init(params), params if optim.ema else (), dict(memory or {}),
            blank_watch(guard) if guard else (),
        )  # fmt: skip

    def init(key):
        # The average starts as a copy: one buffer must not be donated twice.
        return jax.tree.map(jnp.copy, nn.unbox(init_boxed(key)))

    boxed_state = jax.eval_shape(init_boxed, jax.random.key(0))

    def step(state: State, batch, *others):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        more = {"frozen": others[0]} if frozen else {}
        measure = (state.step + 1) % health == 0 if health else None
        if health:
            more["measure"] = measure
        if memory:
            more["memory"] = state.memory

        def objective(params):
            params = jax.tree.map(lambda p, f: p if f else jax.lax.stop_gradient(p), params, free)
            value, told = loss(params, state.ema if optim.ema else params, batch, key, **more)
            if poison:
                value *= jnp.where(jnp.isin(state.step + 1, jnp.array(poison)), jnp.nan, 1.0)
            return value, told

        (value, told), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
        metrics, queues = told if memory else (told, state.memory)
        held = in_device_memory(state.optimizer, mesh, boxed_state.optimizer) if optim.offload else state.optimizer
        updates, moments = optimizer.update(gradient, held, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = ema_update(state.ema, params, ema_decay(optim, state.step, steps), state.step) if optim.ema else ()
        if health:
            metrics = {**metrics, **when(measure, of_gradient, gradient)}
        metrics = {
            "loss": value,
            **metrics,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": rate(state.step),
        }
        new = State(state.step + 1, params, moments, ema, queues)
        if guard:
            good, watch = judge(guard, state.guard, state.step, value, metrics["gradient_norm"])
            new = kept(good, new, state._replace(step=new.step, optimizer=held, guard=()))._replace(guard=watch)
            metrics |= {"skipped": watch.skipped, "skipped/row": watch.row, "layers": layer_norms(gradient)}
        return new, metrics

    def pass_over(state: State) -> State:
        watch = state.guard._replace(skipped=state.guard.skipped + 1) if guard else ()
        return state._replace(step=state.step + 1, optimizer=counted(state.optimizer), guard=watch)

    if mesh is None:
        return Program(
            nn.unbox(boxed_state), jax.jit(init), jax.jit(step, donate_argnums=0), jax.jit(pass_over, donate_argnums=0)
        )
    shapes = place_state(boxed_state, mesh)
    if optim.offload:
        shapes = shapes._replace(optimizer=in_host_memory(shapes.optimizer))
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    whole = NamedSharding(mesh, PartitionSpec())
    return Program(
        shapes,
        jax.jit(init, out_shardings=shardings),
        jax.jit(
            step,
            # Other models' parameters lie as they are given.
            in_shardings=(shardings, batch_sharding(mesh), *((None,) if frozen else ())),
            out_shardings=(shardings, whole),
            donate_argnums=0,
            compiler_options=compiler_options(mesh),
        ),
        jax.jit(pass_over, in_shardings=(shardings,), out_shardings=shardings, donate_argnums=0),
    )
