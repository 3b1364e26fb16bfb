"""A whole config, checked and built: the one place that knows which parts a config has."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from vmm import adapters, perturb
from vmm.augment import CutMix, MixUp, SpecAugment, augment
from vmm.build import build, make
from vmm.config import Card, Config
from vmm.data.manifest import Row
from vmm.data.media import check_size
from vmm.data.samples import Augment, Clip, Data, EvaluationViews, bucket_clips
from vmm.data.spec import DataSpec
from vmm.data.targets import make_targets
from vmm.encoders import ENCODERS
from vmm.errors import UserError, one_of
from vmm.evals import EVALS
from vmm.evals.scored import Measuring
from vmm.model import Recipe, init_queues, loss_function
from vmm.objectives import OBJECTIVES
from vmm.sharding import AXES, MeshShape, auto_shape, make_mesh
from vmm.sizes import check_numbers
from vmm.training.early import Early
from vmm.training.guard import Guard, check_guard
from vmm.training.optim import Optim, trainable
from vmm.training.step import Program, make_program
from vmm.types import MODALITIES, Batch


def _traced(initialise: Callable) -> tuple[Callable, object]:
    """Returns key → tree and the tree's shapes, traced here and nowhere else.

    jax.jit traces again under every mesh that is set, and a model's init is traced through all of its forward pass; of
    that, what no parameter depends on is left out.
    """
    closed, shapes = jax.make_jaxpr(initialise, return_shape=True)(jax.random.key(0))
    needed, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    leaves = jax.jit(jaxpr_as_fun(ClosedJaxpr(needed, closed.consts)))
    return lambda key: jax.tree.unflatten(jax.tree.structure(shapes), leaves(key)), shapes


class Experiment:
    """The parts of a config: config, data, clip, augment, mixup, evaluation, optim, mesh, recipe, evals."""

    def __init__(self, config: Mapping):
        """Raises UserError for any key, kind or value that is wrong, before anything is done."""
        self.config = c = make(Config, config, "config")
        check_numbers(config, "config")
        for name in ("steps", "batch", "save_every", "log_every", "keep"):
            if getattr(c, name) < 1:
                raise UserError(f"config.{name}: must be at least 1, got {getattr(c, name)}")
        if c.health < 0 or c.health % c.log_every:
            raise UserError(f"config.health: {c.health} is no multiple of log_every {c.log_every}; 0: no health panel")
        if c.dtype not in ("float32", "bfloat16"):
            raise UserError(f"config.dtype: must be float32 or bfloat16, got {c.dtype!r}")
        self.data = make(Data, c.data, "data")
        self.clip = make(Clip, self.data.clip, "data.clip")
        check_size(self.clip.size, self.clip.frames, self.clip.seconds)
        bucket_clips(self.data, self.clip)
        self.augment = make(Augment, self.data.augment, "data.augment")
        self.evaluation = make(EvaluationViews, self.data.evaluation, "data.evaluation")
        self.optim = make(Optim, c.optim, "optim")
        if isinstance(c.mesh, str) and c.mesh != "auto":
            raise UserError(f'mesh: "auto" or a group of sizes ({", ".join(AXES)}), got {c.mesh!r}')
        self.mesh = None if c.mesh == "auto" else make(MeshShape, c.mesh, "mesh")
        self.card = make(Card, c.card, "card")
        self.guard = make(Guard, c.guard, "guard")
        check_guard(self.guard)
        self.early = make(Early, c.early, "early")
        self.adversary = make(perturb.Adversary, c.adversary, "adversary") if c.adversary else None
        if not isinstance(c.trunk.get("encoders", {}), Mapping):
            raise UserError(f"trunk.encoders: expected modality → encoder, got {c.trunk['encoders']!r}")
        if self.adversary:
            perturb.check(self.adversary, c.trunk.get("encoders", {}), self.optim.accumulate)
        self.encoders = {
            name: build(ENCODERS, spec, f"trunk.encoders.{name}") for name, spec in c.trunk.get("encoders", {}).items()
        }
        self.objectives = {name: build(OBJECTIVES, spec, f"objectives.{name}") for name, spec in c.objectives.items()}
        self.evals = {
            name: evaluator.trained_on(self.objectives) if isinstance(evaluator, Measuring) else evaluator
            for name, evaluator in ((name, build(EVALS, spec, f"evals.{name}")) for name, spec in c.evals.items())
        }
        watched = self.early.metric.split("/")[0]
        if self.early.metric and watched not in self.evals:
            raise UserError(
                f"early.metric: {self.early.metric!r} is of no evaluator of `evals`; {one_of(watched, self.evals)}"
            )
        spectrogram = make(SpecAugment, self.augment.spectrogram, "data.augment.spectrogram")
        self.recipe = Recipe(
            c.trunk,
            c.views,
            c.objectives,
            c.dtype,
            spectrogram if self.augment.spectrogram else None,
            c.balance,
            c.adapt,
        )
        adapters.check(c.adapt)
        for name, view in c.views.items():
            if not isinstance(view, Mapping):
                raise UserError(f"views.{name}: expected a group of keys, got {view!r}")
        self.mixup = make(MixUp, self.augment.mixup, "data.augment.mixup") if self.augment.mixup else None
        self.cutmix = make(CutMix, self.augment.cutmix, "data.augment.cutmix") if self.augment.cutmix else None
        if self.mixup:
            self._check_mixup()
        if self.cutmix and self.cutmix.alpha <= 0:
            raise UserError("data.augment.cutmix: alpha is above 0")
        if self.mixup or self.cutmix:
            self._check_mixed()
        if any(view.get("teacher") is True for view in c.views.values()) and not self.optim.ema:
            raise UserError("optim.ema: a view has a teacher, which is the running average; give ema a decay above 0")
        unknown = set(c.trunk.get("encoders", {})) - set(MODALITIES)
        if unknown:
            raise UserError(f"trunk.encoders: no data for {sorted(unknown)}; known: {', '.join(MODALITIES)}")
        self._check_data()
        self.initialise, self.shapes = _traced(self.initialise)  # builds every module, once
        self.forwards: dict = {}  # what evaluation compiled, by its mesh, method and arguments
        if c.adapt and "rate_rules" not in c.optim:
            self.optim = dataclasses.replace(self.optim, rate_rules=adapters.freezing(self.shapes))

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model takes."""
        return tuple(self.config.trunk["encoders"])

    def _check_data(self) -> None:
        """Raises UserError where an encoder or an objective does not fit what the data gives."""
        moves = self.augment.flip or tuple(self.augment.area) != (1.0, 1.0) or self.clip.crop != 1.0
        spec = DataSpec(self.data, self.clip, moves)
        for name, encoder in self.encoders.items():
            encoder.check(f"trunk.encoders.{name}", spec)
        for name, objective in self.objectives.items():
            objective.check(f"objectives.{name}", spec)

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raises UserError where an objective does not fit the training clips."""
        for name, objective in self.objectives.items():
            objective.check_rows(f"objectives.{name}", rows)

    def _check_mixup(self) -> None:
        wrong = set(self.mixup.modalities) - {"video", "audio"}
        if wrong or not self.mixup.modalities or self.mixup.alpha <= 0:
            raise UserError(
                "data.augment.mixup: alpha is above 0, and modalities are of video and audio; text cannot be mixed"
            )

    def _check_mixed(self) -> None:
        name, title = ("mixup", "MixUp") if self.mixup else ("cutmix", "CutMix")
        other = [key for key, objective in self.objectives.items() if not objective.accepts_mixed_labels]
        if other:
            raise UserError(
                f"data.augment.{name}: objectives.{other[0]} does not know mixed samples; {title} is for those that do, as classify"
            )

    def make_mesh(self, devices: list | None = None, memory: int | None = None) -> Mesh:
        """Returns the config's mesh over the devices, all of the job's by default.

        memory: bytes of a device, for "auto"; None: what the device says.

        Raises:
          UserError: as sharding.make_mesh.
        """
        devices = jax.devices() if devices is None else devices
        shape = self.mesh
        if shape is None:
            if memory is None and hasattr(devices[0], "memory_stats"):
                memory = (devices[0].memory_stats() or {}).get("bytes_limit")
            copies = 1 + 2 + bool(self.optim.ema)  # parameters, two moments, average
            shape = auto_shape(
                devices, self.config.batch // self.optim.accumulate, 4 * copies * self.parameters(), memory
            )
        return make_mesh(shape, devices)

    def batch_shapes(self, rows: int | None = None) -> Batch:
        """Returns the abstract batch that the loader gives."""
        rows, clip = rows or self.config.batch, self.clip

        def array(shape, dtype):
            return jax.ShapeDtypeStruct((rows, *shape), dtype)

        return Batch(
            inputs={
                "video": array((clip.frames, clip.size, clip.size, 3), jnp.uint8),
                "audio": array((clip.samples,), jnp.float32),
                "text": array((clip.text_length,), jnp.int32),
            },
            present={name: array((), jnp.bool_) for name in MODALITIES},
            labels={name: array((), jnp.int32) for name in self.data.labels}
            | {name: array((classes,), jnp.int32) for name, classes in self.data.tags.items()},
            index=array((), jnp.int32),
            valid=array((), jnp.bool_),
            targets={
                name: jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), target.blank())
                for name, target in make_targets(self.data.targets).items()
            },
        )

    def initialise(self, key: jax.Array):
        """Returns the initial parameters, boxed with their axes: the same for any mesh."""
        # Two rows are enough: parameters do not depend on the batch.
        batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.batch_shapes(2))
        keys = jax.random.split(key, 2)
        return adapters.add(self.recipe.init(key, batch, keys)["params"], self.config.adapt, key)

    def merged(self, params):
        """Returns parameters as a model without adapters has them, see adapters.merge."""
        return adapters.merge(params, self.config.adapt)

    def loss(self, teachers: Mapping | None = None) -> Callable:
        """Returns (params, teacher, batch, key) → (loss, metrics), see loss_function."""
        a = self.augment
        change = functools.partial(augment, colour=a.colour, gain=a.gain, mixup=self.mixup, cutmix=self.cutmix)
        return loss_function(self.recipe, self.optim.accumulate, change, teachers, self.adversary)

    def program(self, mesh, teachers: Mapping | None = None, poison: tuple[int, ...] = ()) -> Program:
        """Returns the compiled-on-demand init and step of this experiment.

        teachers: view → Trunk of another model, for the views that name one (teachers.py); then the step takes their
        parameters too. poison: see make_program.
        """
        c = self.config
        return make_program(
            self.initialise, self.loss(teachers), self.optim,
            steps=c.steps, seed=c.seed, mesh=mesh, health=c.health, frozen=bool(teachers), memory=init_queues(self.recipe),
            guard=self.guard, poison=poison, adapt=c.adapt,
        )  # fmt: skip

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.shapes))

    def trained(self) -> int:
        """Returns the number of parameters that are not frozen."""
        shapes = nn.unbox(self.shapes)
        free = jax.tree.leaves(trainable(self.optim, shapes))
        return sum(int(np.prod(leaf.shape)) for leaf, mine in zip(jax.tree.leaves(shapes), free) if mine)
