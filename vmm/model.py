"""Trunk = encoders + fusion; Recipe = trunk + views + objectives: one batch → one loss.

A *view* is one pass through the trunk: which tokens are shown, and whose parameters see them. Each
view that an objective reads runs once; patches (and the log-mel under them) are made once for all.
"""

import zlib
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vmm import masking
from vmm.augment import SpecAugment, spec_augment
from vmm.build import build
from vmm.encoders import ENCODERS
from vmm.errors import UserError, one_of
from vmm.fusion import FUSIONS
from vmm.layers import pool
from vmm.objectives import OBJECTIVES
from vmm.objectives.contrastive import Contrastive
from vmm.types import Batch, Mask, Outputs, Patches, Tokens


class Trunk(nn.Module):
    """Encoders and fusion. encoders: modality → spec of ENCODERS. fusion: spec of FUSIONS.

    dtype: what activations are computed in; parameters are float32 always.
    """

    encoders: Mapping
    fusion: Mapping
    dtype: str = "float32"

    def setup(self):
        self.encoder = {
            name: build(ENCODERS, spec, f"trunk.encoders.{name}", dtype=self.dtype)
            for name, spec in self.encoders.items()
        }
        self.fuse = build(FUSIONS, self.fusion, "trunk.fusion")

    def patches(self, inputs: Mapping, present: Mapping) -> dict:
        """Cuts every input into tokens, valid only where the sample has the stream."""
        result = {}
        for name in self.encoder:
            patches = self.encoder[name].patches(inputs[name])
            result[name] = patches._replace(valid=patches.valid & present[name][:, None])
        return result

    def encode(self, name: str, patches: Patches, mask: Mask | None = None) -> Tokens:
        """Encodes the shown tokens of one modality."""
        tokens = self.encoder[name](patches, mask.keep if mask else None)
        # What is not there is zero from here on, whatever the encoder made of it.
        return tokens._replace(x=jnp.where(tokens.valid[..., None], tokens.x, 0))

    def __call__(self, patches: Mapping, masks: Mapping) -> Outputs:
        """Encodes and fuses the shown tokens. masks: modality → Mask, for those partly hidden."""
        encoded = {name: self.encode(name, patches[name], masks.get(name)) for name in self.encoder}
        return Outputs(encoded, self.fuse(encoded), dict(patches), dict(masks))


class Recipe(nn.Module):
    """What is trained: a trunk, the views of it, and the objectives that read them.

    trunk: fields of Trunk. views: name → {modality: {"kind": mask, "ratio": r}, "teacher": bool}.
    objectives: name → spec of OBJECTIVES, each with the `view` it reads and its `weight`.
    spectrogram: SpecAugment of the sound while training; never in predict and embed.
    """

    trunk: Mapping
    views: Mapping
    objectives: Mapping
    dtype: str = "float32"
    spectrogram: SpecAugment | None = None

    def setup(self):
        self.model = build({"trunk": Trunk}, {"kind": "trunk", **self.trunk}, "trunk", dtype=self.dtype)
        self.objective = {name: build(OBJECTIVES, spec, f"objectives.{name}") for name, spec in self.objectives.items()}
        self._check()

    def _check(self) -> None:
        if not self.objectives:
            raise UserError(f"objectives: none given; {one_of('', OBJECTIVES)}")
        for view, spec in self.views.items():
            for key, value in spec.items():
                if key == "teacher":
                    continue
                if key not in self.trunk["encoders"]:
                    raise UserError(
                        f"views.{view}.{key}: no such modality; {one_of(key, [*self.trunk['encoders'], 'teacher'])}"
                    )
                if set(value) != {"kind", "ratio"}:
                    raise UserError(f"views.{view}.{key}: a mask has a kind and a ratio, got {sorted(value)}")
                if value["kind"] not in masking.MASKS:
                    raise UserError(
                        f"views.{view}.{key}.kind: unknown mask {value['kind']!r}; {one_of(value['kind'], masking.MASKS)}"
                    )
        for name, objective in self.objective.items():
            if objective.view not in self.views:
                raise UserError(
                    f"objectives.{name}.view: no view {objective.view!r}; {one_of(objective.view, self.views)}"
                )

    def patches(self, batch: Batch) -> dict:
        """Returns modality → Patches of a batch."""
        return self.model.patches(batch.inputs, batch.present)

    def _look(self, view: str, patches: Mapping, keys: Array) -> Outputs:
        masks = {}
        for name, spec in self.views[view].items():
            if name != "teacher":
                mine = jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(f"{view}/{name}".encode()))
                masks[name] = masking.sample(spec["kind"], mine, patches[name].valid, patches[name].grid, spec["ratio"])
        return self.model(patches, masks)

    def look(self, batch: Batch, keys: Array, teacher: bool) -> dict:
        """Returns view → Outputs for the views that objectives read and that are (not) a teacher's."""
        patches = self.patches(batch)
        if self.spectrogram and "audio" in patches:
            patch = self.model.encoder["audio"].patch
            patches["audio"] = spec_augment(patches["audio"], patch, keys, self.spectrogram)
        wanted = dict.fromkeys(objective.view for objective in self.objective.values())
        return {
            view: self._look(view, patches, keys)
            for view in wanted
            if bool(self.views[view].get("teacher", False)) == teacher
        }

    def features(self, batch: Batch, keys: Array, taught: Mapping) -> dict:
        """Returns objective → features. taught: the teacher's views, from `look`."""
        seen = {**self.look(batch, keys, False), **taught}
        return {name: objective.features(seen[objective.view], batch) for name, objective in self.objective.items()}

    def loss(self, features: Mapping) -> tuple:
        """Returns the weighted sum of the objectives' losses, and their metrics by name."""
        total, metrics = 0.0, {}
        for name, objective in self.objective.items():
            value, extra = objective.loss(features[name])
            metrics |= {name: value} | {f"{name}/{key}": item for key, item in extra.items()}
            total += objective.weight * value
        return total, metrics

    def __call__(self, batch: Batch, keys: Array) -> tuple:
        """One pass with the model as its own teacher: initialises every parameter."""
        return self.loss(self.features(batch, keys, self.look(batch, keys, True)))

    def predict(self, batch: Batch, view: str | None = None, keys: Array | None = None) -> dict:
        """Returns what the objectives and the trunk say of a batch: name → array [B …].

        view: None shows everything; an objective that needs hidden tokens then says nothing. Else
        the objectives that read that view speak, and where the tokens they speak of were hidden
        stands under `hidden/<modality>`; masks are drawn from `keys` [B].
        """
        patches = self.patches(batch)
        outputs = self.model(patches, {}) if view is None else self._look(view, patches, keys)
        result = {}
        for name, objective in self.objective.items():
            if objective.view == view if view is not None else not objective.needs_hidden:
                result |= {f"{name}/{key}": value for key, value in objective.predict(outputs, batch).items()}
        result |= {f"hidden/{name}": mask.hidden for name, mask in outputs.masks.items()}
        if view is None:
            for name in outputs.encoded:
                result[f"encoded/{name}"] = pool(outputs.encoded[name])
                result[f"fused/{name}"] = pool(outputs.fused[name])
        return result

    def embed(self, inputs: Mapping) -> dict:
        """Returns modality → one vector a clip, for the modalities in `inputs`; no fusion, no other stream.

        The unit embeddings of the first contrastive objective that has the modality, else the mean token.
        """
        result = {}
        for name, array in inputs.items():
            tokens = self.model.encode(name, self.model.encoder[name].patches(array))
            heads = [o for o in self.objective.values() if isinstance(o, Contrastive) and name in o.modalities]
            result[name] = heads[0].embed(name, tokens) if heads else pool(tokens)
        return result


def sample_keys(key: Array, index: Array) -> Array:
    """Returns one key per sample, from its own index: the same in any batch, on any device."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def loss_function(recipe: Recipe, accumulate: int = 1, augment: Callable | None = None) -> Callable:
    """Returns loss(params, teacher, batch, key) → (scalar, metrics), for one global batch.

    teacher: parameters of teacher views (the EMA); their gradient is zero.
    augment: (batch, keys) → batch, before anything else.
    accumulate: the trunk runs over this many parts of the batch, one after the other, and again
    for the gradient, so that the activations of one part are held at a time. The loss is that of
    the whole batch, negatives and means included: exactly that of accumulate = 1.
    """
    has_teacher = any(view.get("teacher", False) for view in recipe.views.values())

    def features(params, teacher, batch, keys):
        taught = {}
        if has_teacher:
            frozen = jax.lax.stop_gradient(teacher)
            taught = recipe.apply({"params": frozen}, batch, keys, True, method="look")
        return recipe.apply({"params": params}, batch, keys, taught, method="features")

    def loss(params, teacher, batch, key):
        keys = sample_keys(key, batch.index)
        batch = augment(batch, keys) if augment else batch
        if accumulate == 1:
            value = features(params, teacher, batch, keys)
        else:
            # Part a holds rows a, a + A, …: each device splits its own rows, nothing moves.
            parts = jax.tree.map(
                lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), (batch, keys)
            )
            part = jax.checkpoint(lambda parts: features(params, teacher, *parts))
            value = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(part, parts))
        return recipe.apply({"params": params}, value, method="loss")

    return loss
