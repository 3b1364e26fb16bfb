"""Trunk = encoders + fusion; Recipe = trunk + views + objectives: one batch → one loss.

A *view* is one pass through the trunk: which tokens are shown, and whose parameters see them. Each
view that an objective reads runs once; patches (and the log-mel under them) are made once for all.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vmm import adapters, masking, pairing, perturb
from vmm.augment import SpecAugment, add_noise, spec_augment
from vmm.build import build, shown
from vmm.encoders import ENCODERS
from vmm.errors import UserError, one_of
from vmm.fusion import FUSIONS
from vmm.layers import layers_of, pool, regularise, scalar
from vmm.objectives import OBJECTIVES
from vmm.objectives.base import Embeds, Generates, by_capability
from vmm.settings import setting
from vmm.training import health
from vmm.types import TOLD, Batch, Mask, Outputs, Patches, Tokens


class Trunk(nn.Module):
    """Encoders and fusion. encoders: modality → spec of ENCODERS. fusion: spec of FUSIONS.

    apart: modalities that are encoded and not fused, "text" of a model whose fused video and sound are to be compared with
    texts that they have not seen; Outputs.fused has none of them.
    dtype: what activations are computed in; parameters are float32 always.
    """

    encoders: Mapping = setting(text="Modality to encoder.", table=ENCODERS, each=True)
    fusion: Mapping = setting(text="How encoded streams are fused.", table=FUSIONS)
    apart: tuple[str, ...] = ()
    dtype: str = "float32"

    def setup(self):
        unknown = [name for name in self.apart if name not in self.encoders]
        if unknown or not set(self.encoders) - set(self.apart):
            raise UserError(
                f"trunk.apart: some of {sorted(self.encoders)} that leave others to be fused, got {list(self.apart)}"
            )
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

    def fused(self, encoded: Mapping) -> dict:
        """Fuses encoded streams: those that do not stay apart."""
        return self.fuse({name: tokens for name, tokens in encoded.items() if name not in self.apart})

    def __call__(self, patches: Mapping, masks: Mapping) -> Outputs:
        """Encodes and fuses the shown tokens. masks: modality → Mask, for those partly hidden."""
        encoded = {name: self.encode(name, patches[name], masks.get(name)) for name in self.encoder}
        # What was sown for who asks for the collection (a teacher's views); else there is nothing.
        sown = {name: encoder.variables.get("layers", {}) for name, encoder in self.encoder.items()}
        layers = {name: layers_of(tree) for name, tree in sown.items()}
        return Outputs(encoded, self.fused(encoded), dict(patches), dict(masks), layers)

    def whole(self, inputs: Mapping, present: Mapping) -> Outputs:
        """Encodes and fuses every token of a batch's inputs."""
        return self(self.patches(inputs, present), {})


BALANCES = ("fixed", "gradient", "uncertainty")


class Recipe(nn.Module):
    """What is trained: a trunk, the views of it, and the objectives that read them.

    trunk: fields of Trunk. views: name → {modality: {"kind": mask, "ratio": r, **its fields, "noise": d}, "teacher": who};
    "noise", also without a mask, is a deviation, see augment.add_noise; the teacher is True, the running average of this model, or the folder of a published one, which sees everything.
    Or {"of": another view, "swap": a modality}: that view's encoded streams, of which one is another sample's, are fused
    again. The other is drawn of `among` neighbours in the batch (32; of its part, with accumulate), never one that lacks
    the modality or has the same text; "hard": the contrastive objective by whose logits, else evenly.
    objectives: name → spec of OBJECTIVES, each with the `view` it reads, its `weight` w, and for some a teacher's
    view, the `target`.
    spectrogram: SpecAugment of the sound while training; never in predict and embed.
    balance: how losses L are summed. "fixed": Σ w L. "uncertainty": Σ w (exp(−s) L + s), s learned, one a loss (Kendall
    et al. 2018, twice eq. 7, s = ln σ²): at rest exp(−s) = 1 / L. "gradient": Σ w c L, where c brings the
    norm of each loss's gradient, at the tokens of its view, to the w-weighted mean of these norms (the aim of GradNorm,
    Chen et al. 2018, at every step anew); c is at most 100, and no gradient flows through it. It costs the backward
    pass of the heads once more, and with `accumulate` a forward pass too.
    adapt: see adapters; `apply` takes parameters with adapters and merges them first.
    """

    trunk: Mapping
    views: Mapping
    objectives: Mapping
    dtype: str = "float32"
    spectrogram: SpecAugment | None = None
    balance: str = "fixed"
    adapt: tuple = ()

    @nn.nowrap
    def apply(self, variables: Mapping, *args, **options):
        """As Linen's; what adapters make of the parameters is what the modules see."""
        variables = {**variables, "params": adapters.merge(variables["params"], self.adapt)}
        return super().apply(variables, *args, **options)

    def setup(self):
        self.model = build({"trunk": Trunk}, {"kind": "trunk", **self.trunk}, "trunk", dtype=self.dtype)
        self.objective = {name: build(OBJECTIVES, spec, f"objectives.{name}") for name, spec in self.objectives.items()}
        self._check()
        if self.balance == "uncertainty":
            self.doubt = {name: scalar(self, f"balance_{name}", 0.0) for name in self.objectives}

    def _check(self) -> None:
        if self.balance not in BALANCES:
            raise UserError(f"balance: unknown {self.balance!r}; {one_of(self.balance, BALANCES)}")
        for view, spec in self.views.items():
            if "of" in spec:
                self._check_swap(view, spec)
                continue
            for key, value in spec.items():
                if key == "teacher":
                    if not isinstance(value, (bool, str)):
                        raise UserError(
                            f"views.{view}.teacher: True, or the folder of a published model; got {value!r}"
                        )
                    if isinstance(value, str) and len(spec) > 1:
                        raise UserError(
                            f"views.{view}: another model sees everything; take {sorted(set(spec) - {key})} out"
                        )
                    continue
                if key not in self.trunk["encoders"]:
                    raise UserError(
                        f"views.{view}.{key}: no such modality; {one_of(key, [*self.trunk['encoders'], 'teacher'])}"
                    )
                if not isinstance(value, Mapping) or not ({"kind", "ratio"} <= set(value) or set(value) == {"noise"}):
                    raise UserError(
                        f"views.{view}.{key}: a mask is a group of a kind and a ratio, with `noise` or `noise` alone, got {shown(value)}"
                    )
                ratio = value.get("ratio", 0.0)
                if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
                    raise UserError(f"views.{view}.{key}.ratio: a share in [0, 1], got {shown(ratio)}")
                self._check_noise(f"views.{view}.{key}.noise", key, value.get("noise", 0.0))
                if "kind" in value and (
                    not isinstance(value["kind"], str) or masking.MASKS.find(value["kind"]) is None
                ):
                    raise UserError(
                        f"views.{view}.{key}.kind: unknown mask {shown(value['kind'])}; {one_of(value['kind'], masking.MASKS.names())}"
                    )
        for name, objective in self.objective.items():
            if name in TOLD:
                raise UserError(f"objectives.{name}: predictions need that name for something else; choose another")
            if objective.view not in self.views:
                raise UserError(
                    f"objectives.{name}.view: no view {objective.view!r}; {one_of(objective.view, self.views)}"
                )
            if isinstance(self.views[objective.view].get("teacher"), str):
                raise UserError(f"objectives.{name}.view: {objective.view!r} is of another model; name it as `target`")
            target = objective.target
            if target is not None and not self.views.get(target, {}).get("teacher"):
                taught = [view for view, spec in self.views.items() if spec.get("teacher")]
                raise UserError(f"objectives.{name}.target: no teacher's view {target!r}; {one_of(target, taught)}")

    def _check_noise(self, where: str, name: str, level: float) -> None:
        if not isinstance(level, (int, float)) or level < 0 or (level and name == "text"):
            raise UserError(f"{where}: a standard deviation of at least 0, of video or audio, got {level!r}")

    def _check_swap(self, view: str, spec: Mapping) -> None:
        of, name, hard = spec["of"], spec.get("swap"), spec.get("hard")
        plain = [key for key, value in self.views.items() if not {"of", "teacher"} & set(value)]
        if of not in plain:
            raise UserError(f"views.{view}.of: no view {of!r} that shows streams to the student; {one_of(of, plain)}")
        if (
            set(spec) - {"of", "swap", "hard", "among"}
            or name not in self.trunk["encoders"]
            or spec.get("among", 2) < 2
        ):
            raise UserError(
                f"views.{view}: a view of another has of, swap (one of {sorted(self.trunk['encoders'])}), hard (a "
                f"contrastive objective) and among (2 or more), got {dict(spec)}"
            )
        known = [key for key in by_capability(self.objective, Embeds) if name in self.objective[key].modalities]
        if hard is not None and hard not in known:
            raise UserError(f"views.{view}.hard: no objective {hard!r} that embeds {name!r}; {one_of(hard, known)}")

    def patches(self, batch: Batch) -> dict:
        """Returns modality → Patches of a batch."""
        return self.model.patches(batch.inputs, batch.present)

    def _look(self, view: str, patches: Mapping, keys: Array, valid: Array) -> Outputs:
        if "of" in self.views[view]:
            return self._swap(view, self._look(self.views[view]["of"], patches, keys, valid), keys, valid)
        masks, seen = {}, dict(patches)
        for name, spec in self.views[view].items():
            if name != "teacher" and spec.get("noise"):
                mine = jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(f"{view}/{name}/noise".encode()))
                seen[name] = add_noise(patches[name], mine, spec["noise"])
            if name != "teacher" and "kind" in spec:
                mine = jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(f"{view}/{name}".encode()))
                fields = {key: value for key, value in spec.items() if key not in ("kind", "ratio", "noise")}
                valid, grid = patches[name].valid, patches[name].grid
                masks[name] = masking.sample(
                    spec["kind"], mine, valid, grid, spec["ratio"], fields, f"views.{view}.{name}"
                )
        outputs = self.model(seen, masks)
        noisy = [name for name in seen if seen[name] is not patches[name]]
        return outputs._replace(clean={name: patches[name] for name in noisy})

    def _swap(self, view: str, outputs: Outputs, keys: Array, valid: Array) -> Outputs:
        """Returns the outputs with one stream of each sample taken from another. valid: bool [B], who is in the batch."""
        spec, encoded = self.views[view], outputs.encoded
        name, among = spec["swap"], spec.get("among", 32)
        there = {key: tokens.valid.any(1) & valid for key, tokens in encoded.items()}
        if "hard" in spec:
            anchor, candidate = self.objective[spec["hard"]].similarity(name, encoded)
        else:
            anchor = candidate = jnp.zeros((len(valid), 1), jnp.float32)
        marks = [(pairing.fingerprint(p), there[key]) for key, p in outputs.patches.items() if p.classes]
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(f"{view}/swap".encode()))
        index, found = pairing.draw(keys, anchor, candidate, there[name], marks, among)
        others = jnp.stack([value for key, value in there.items() if key != name]).any(0)
        patches, masks = dict(outputs.patches), dict(outputs.masks)
        values, seen = pairing.take((patches[name].values, patches[name].valid), index, among)
        patches[name] = patches[name]._replace(values=values, valid=seen)
        masks |= {name: pairing.take(masks[name], index, among)} if name in masks else {}
        encoded = encoded | {name: pairing.take(encoded[name], index, among)}
        swapped = found & there[name] & others
        return Outputs(encoded, self.model.fused(encoded), patches, masks, target=outputs, swapped=swapped)

    def look(self, batch: Batch, keys: Array, teacher: bool) -> dict:
        """Returns view → Outputs for the views that objectives read and that are (not) the running average's.

        Views of another model are not among them: their parameters are not here.
        """
        patches = self.patches(batch)
        if self.spectrogram and "audio" in patches:
            patch, stride = self.model.encoder["audio"].windows
            patches["audio"] = spec_augment(patches["audio"], patch, keys, self.spectrogram, stride)
        wanted = dict.fromkeys(view for o in self.objective.values() for view in (o.view, o.target) if view is not None)
        # Dropout and stochastic depth are for the student.
        own = None if teacher else keys
        seen = {}

        def look(view):
            with regularise.dropping(own, view):
                return self._look(view, patches, keys, batch.valid)

        for view in wanted:
            if self.views[view].get("teacher", False) is teacher and "of" not in self.views[view]:
                seen[view] = look(view)
        for view in wanted if not teacher else ():
            of = self.views[view].get("of")
            if of is not None:
                whole = seen[of] if of in seen else look(of)
                with regularise.dropping(own, view):
                    seen[view] = self._swap(view, whole, keys, batch.valid)
        return seen

    def changed(self, seen: Mapping, change: Mapping, keys: Array) -> dict:
        """Returns the views of `change` with encoded streams changed by it, view → modality → [B N D], and fused again."""
        result = {}
        for view, own in change.items():
            encoded = dict(seen[view].encoded)
            for name, x in own.items():
                encoded[name] = encoded[name]._replace(x=encoded[name].x + x.astype(encoded[name].x.dtype))
            with regularise.dropping(keys, view):
                result[view] = seen[view]._replace(encoded=encoded, fused=self.model.fused(encoded))
        return result

    def head(self, name: str, seen: Mapping, batch: Batch, keys: Array | None = None) -> dict:
        """Returns the features of one objective. seen: view → Outputs. keys: one a sample, for what its layers drop;
        None: nothing."""
        objective = self.objective[name]
        outputs, target = seen[objective.view], objective.target
        outputs = outputs if target is None else outputs._replace(target=seen.get(target))
        with regularise.dropping(keys, f"objectives/{name}"):
            return objective.features(outputs, batch)

    def features(self, batch: Batch, keys: Array, taught: Mapping) -> dict:
        """Returns objective → features. taught: the teacher's views, from `look`."""
        seen = {**self.look(batch, keys, False), **taught}
        return {name: self.head(name, seen, batch, keys) for name in self.objective}

    def value(self, name: str, features: Mapping) -> Array:
        """Returns the loss of one objective."""
        return self.objective[name].loss(features)[0]

    def loss(self, features: Mapping, norms: Mapping | None = None, memory: Mapping = MappingProxyType({})) -> tuple:
        """Returns the sum of the objectives' losses, as `balance` weighs them, and their metrics by name.

        memory: objective → its queue, for those that have one. norms: objective → norm of its loss's gradient, for the balance "gradient"; None: as "fixed".
        """
        values, metrics = {}, {}
        for name, objective in self.objective.items():
            past = (memory[name],) if name in memory else ()
            values[name], extra = objective.loss(features[name], *past)
            metrics |= {name: values[name]} | {f"{name}/{key}": item for key, item in extra.items()}
        weights = {name: objective.weight for name, objective in self.objective.items()}
        total = 0.0
        if self.balance == "uncertainty":
            factors = {name: jnp.exp(-self.doubt[name]) for name in values}
            total = sum(weights[name] * self.doubt[name] for name in values)
        elif self.balance == "gradient" and norms is not None:
            mean = sum(weights[name] * norms[name] for name in values) / max(sum(weights.values()), 1e-30)
            factors = {name: jnp.minimum(mean / jnp.maximum(norms[name], 1e-30), 100.0) for name in values}
        else:
            factors = dict.fromkeys(values, 1.0)
        for name, value in values.items():
            total += weights[name] * factors[name] * value
            if self.balance != "fixed":
                metrics[f"{name}/balance"] = jnp.float32(weights[name] * factors[name])
        return total, metrics

    def __call__(self, batch: Batch, keys: Array) -> tuple:
        """One pass with the model as its own teacher: initialises every parameter."""
        if not self.objective:  # a published trunk
            self.model(self.patches(batch), {})
        return self.loss(self.features(batch, keys, self.look(batch, keys, True)))

    def predict(self, batch: Batch, view: str | None = None, keys: Array | None = None) -> dict:
        """Returns what the objectives and the trunk say of a batch: name → array [B …].

        view: None shows everything; an objective that needs hidden tokens then says nothing. Else
        the objectives that read that view speak, and where the tokens they speak of were hidden
        stands under `hidden/<modality>`; masks are drawn from `keys` [B].
        """
        patches = self.patches(batch)
        outputs = self.model(patches, {}) if view is None else self._look(view, patches, keys, batch.valid)
        result = {}
        for name, objective in self.objective.items():
            if objective.view == view if view is not None else not objective.needs_hidden:
                result |= {f"{name}/{key}": value for key, value in objective.predict(outputs, batch).items()}
        result |= {f"hidden/{name}": mask.hidden for name, mask in outputs.masks.items()}
        if view is None:
            for name in outputs.encoded:
                result[f"encoded/{name}"] = pool(outputs.encoded[name])
            for name in outputs.fused:
                result[f"fused/{name}"] = pool(outputs.fused[name])
        return result

    def draw(self, batch: Batch, name: str, keys: Array) -> dict:
        """Returns the pictures [B T H W 3] of an objective that draws them, see Pixels.pictures."""
        view = self.objective[name].view
        outputs = self._look(view, self.patches(batch), keys, batch.valid)
        return self.objective[name].pictures(outputs, batch)

    def generate(
        self,
        batch: Batch,
        keys: Array,
        objective: str,
        end: int,
        length: int = 0,
        beams: int = 1,
        penalty: float = 0.0,
    ) -> dict:
        """Returns what an objective generates: objective/ids int32 [B L] and objective/likelihood [B].

        Of everything shown, but where the objective asks for a view that hides its text. Arguments: see
        Captioning.generate.
        """
        module = self.objective.get(objective)
        if not isinstance(module, Generates):
            known = by_capability(self.objective, Generates)
            raise UserError(f"no objective {objective!r} that writes; {one_of(objective, known)}")
        patches = self.patches(batch)
        look = module.needs_hidden
        outputs = self._look(module.view, patches, keys, batch.valid) if look else self.model(patches, {})
        found = module.generate(outputs, batch, end, length, beams, penalty)
        return {f"{objective}/{key}": value for key, value in found.items()}

    def embed(self, inputs: Mapping) -> dict:
        """Returns modality → one vector a clip, for the modalities in `inputs`; no fusion, no other stream.

        The unit embeddings of the first contrastive objective that has the modality, else the mean token.
        """
        result = {}
        for name, array in inputs.items():
            tokens = self.model.encode(name, self.model.encoder[name].patches(array))
            heads = [o for o in self.objective.values() if isinstance(o, Embeds) and name in o.modalities]
            result[name] = heads[0].embed(name, tokens) if heads else pool(tokens)
        return result


def sample_keys(key: Array, index: Array) -> Array:
    """Returns one key per sample, from its own index: the same in any batch, on any device."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def init_queues(recipe: Recipe) -> dict:
    """Returns objective → its empty queue, for those that have one."""
    objectives = {name: build(OBJECTIVES, spec, f"objectives.{name}") for name, spec in recipe.objectives.items()}
    queues = {name: objective.init_queue() for name, objective in objectives.items()}
    return {name: queue for name, queue in queues.items() if queue is not None}


def loss_function(
    recipe: Recipe,
    accumulate: int = 1,
    augment: Callable | None = None,
    teachers: Mapping[str, Trunk] | None = None,
    adversary: perturb.Adversary | None = None,
) -> Callable:
    """Returns loss(params, teacher, batch, key, frozen={}, measure=None, memory=None) → (scalar, metrics), for one batch.

    teacher: parameters of the running average, which sees teacher views; their gradient is zero.
    frozen: view → parameters of another model's trunk, for each of `teachers`; likewise.
    measure: bool [], whether to compute the health panel (training/health.py), whose numbers else are not-a-number;
    None: it is not in the metrics.
    memory: objective → queue of past embeddings, see init_queues; then (metrics, the queues after this step) stands in
    place of metrics.
    augment: (batch, keys) → batch, before anything else.
    accumulate: the trunk runs over this many parts of the batch, one after the other, and again
    for the gradient, so that the activations of one part are held at a time. The loss is that of
    the whole batch, negatives and means included: exactly that of accumulate = 1, but for views that swap, whose
    partners are of the part.
    adversary: adds the loss of perturbed streams, of views that a student sees and that swap nothing; not with accumulate.
    """
    teachers = teachers or {}
    has_teacher = any(view.get("teacher", False) is True for view in recipe.views.values())
    objectives = {name: build(OBJECTIVES, spec, f"objectives.{name}") for name, spec in recipe.objectives.items()}

    def in_parts(function, *rows):
        """function(*rows), by part: its results are stacked on a first axis of `accumulate`."""
        # Part a holds rows a, a + A, …: each device splits its own rows, nothing moves.
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), rows
        )
        return jax.lax.map(jax.checkpoint(lambda part: function(*part)), parts)

    def joined(parts):
        """Stacked parts → rows of the whole batch, in its order."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)

    def look(models, batch, keys):
        """(view → Outputs, gates by name) of a part of the batch."""
        params, teacher, frozen = models
        taught = {}
        if has_teacher:
            variables = {"params": jax.lax.stop_gradient(teacher)}
            taught, _ = recipe.apply(variables, batch, keys, True, method="look", mutable=["layers"])
        for view, trunk in teachers.items():
            variables = {"params": jax.lax.stop_gradient(frozen[view])}
            taught[view] = trunk.apply(variables, batch.inputs, batch.present, method="whole")
        seen, sown = recipe.apply({"params": params}, batch, keys, False, method="look", mutable=["gates"])
        return {**seen, **taught}, health.of_gates(sown.get("gates", {}))

    def features(models, measured, batch, keys):
        """(view → Outputs, objective → features, mean tokens, gates) of a part of the batch."""
        seen, gates = look(models, batch, keys)
        params = {"params": models[0]}
        heads = {name: recipe.apply(params, name, seen, batch, keys, method="head") for name in objectives}
        return seen, heads, *((_pooled(objectives, recipe.views, seen, batch), gates) if measured else ({}, {}))

    def norms(models, features, seen, batch, keys):
        """objective → norm of its loss's gradient, with respect to the tokens of the view that it reads.

        seen: of the whole batch, None: it is looked at again, part by part.
        """
        params = {"params": models[0]}

        def cotangent(name):
            floats, rest = _split(features[name])
            return jax.grad(lambda x: recipe.apply(params, name, _merge(x, rest), method="value"))(floats)

        def squares(seen, batch, keys, cotangents):
            result = {}
            for name, objective in objectives.items():
                view = objective.view

                def head(x, name=name, view=view):
                    outputs = {**seen, view: _with_tokens(seen[view], x)}
                    return _split(recipe.apply(params, name, outputs, batch, keys, method="head"))[0]

                _, pull = jax.vjp(head, _tokens(seen[view]))
                result[name] = sum(
                    jnp.square(g.astype(jnp.float32)).sum() for g in jax.tree.leaves(pull(cotangents[name]))
                )
            return result

        cotangents = {name: cotangent(name) for name in objectives}
        if seen is not None:
            values = squares(seen, batch, keys, cotangents)
        else:
            again = in_parts(
                lambda batch, keys, c: squares(look(models, batch, keys)[0], batch, keys, c), batch, keys, cotangents
            )
            values = {name: value.sum() for name, value in again.items()}
        return {name: jnp.sqrt(value) for name, value in values.items()}

    def adverse(params, seen, batch, keys, sizes, memory):
        """The loss where the encoded streams are perturbed."""
        own = {o.view for o in objectives.values()}
        mine = [view for view in seen if view in own and not {"teacher", "of"} & set(recipe.views[view])]
        names = adversary.modalities or tuple(recipe.trunk["encoders"])
        streams = {view: {name: seen[view].encoded[name].x for name in names} for view in mine}

        def under(params, seen, change):
            apply = functools.partial(recipe.apply, {"params": params})
            now = {**seen, **apply(seen, change, keys, method="changed")}
            heads = {name: apply(name, now, batch, keys, method="head") for name in objectives}
            return apply(heads, sizes, memory or {}, method="loss")[0]

        still = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, (params, seen))
        return under(params, seen, perturb.ascend(lambda change: under(*still, change), streams, adversary))

    def loss(params, teacher, batch, key, frozen=None, measure=None, memory=None):
        keys = sample_keys(key, batch.index)
        batch = augment(batch, keys) if augment else batch
        extra = adapters.penalty(params, recipe.adapt)
        # Once, not once for each part of the batch.
        params, teacher = (adapters.merge(tree, recipe.adapt) for tree in (params, teacher))
        models = (params, teacher, frozen or {})
        if accumulate == 1:
            seen, heads, pooled, gates = features(models, measure is not None, batch, keys)
        else:
            heads, pooled, gates = in_parts(lambda *part: features(models, measure is not None, *part)[1:], batch, keys)
            seen, (heads, pooled), gates = None, joined((heads, pooled)), jax.tree.map(jnp.mean, gates)
        # Grids are numbers, and stay so.
        still = jax.tree.map(
            lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, (models, heads, seen, batch, keys)
        )
        sizes = norms(*still) if recipe.balance == "gradient" else None
        value, metrics = recipe.apply({"params": params}, heads, sizes, memory or {}, method="loss")
        if adversary:
            harder = adverse(params, seen, batch, keys, sizes, memory)
            value, metrics = value + adversary.weight * harder, metrics | {"adversary": harder}
        value += extra
        if measure is not None:
            weights = {name: metrics.get(f"{name}/balance", objectives[name].weight) for name in objectives}

            def panel(pooled, gates, weights):
                own = norms(*still) if sizes is None else sizes
                pairs = {}
                for name, objective in objectives.items():
                    pairs = objective.compared(still[1][name]) | pairs  # the first that compares a pair counts
                return {
                    **health.of_features(pooled),
                    **health.of_pairs(pairs),
                    **health.shares({name: jnp.abs(weights[name]) * own[name] for name in own}),
                    **gates,
                }

            metrics = {**metrics, **health.when(measure, panel, pooled, gates, weights)}
        if memory is not None:
            return value, (metrics, {name: objectives[name].enqueue(memory[name], heads[name]) for name in memory})
        return value, metrics

    return loss


def _pooled(objectives: Mapping, views: Mapping, seen: Mapping, batch: Batch) -> dict:
    """Mean tokens of the first view that a student sees: "<modality>/<stage>" → ([B D], there [B])."""
    mine = [o.view for o in objectives.values() if not views[o.view].get("teacher")]
    result = {}
    for stage in ("encoded", "fused") if mine else ():
        for name, tokens in getattr(seen[mine[0]], stage).items():
            result[f"{name}/{stage}"] = (pool(tokens), tokens.valid.any(1) & batch.valid)
    return result


def _split(tree) -> tuple[list, tuple]:
    """A tree → its float arrays, and what `_merge` makes the tree of again."""
    leaves, structure = jax.tree.flatten(tree)
    mine = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    rest = [None if float_ else leaf for leaf, float_ in zip(leaves, mine)]
    return [leaf for leaf, float_ in zip(leaves, mine) if float_], (rest, structure)


def _merge(floats: list, rest: tuple):
    others, structure = rest
    given = iter(floats)
    return jax.tree.unflatten(structure, [next(given) if leaf is None else leaf for leaf in others])


def _tokens(outputs: Outputs) -> list:
    return [{name: tokens.x for name, tokens in streams.items()} for streams in (outputs.encoded, outputs.fused)]


def _with_tokens(outputs: Outputs, x: list) -> Outputs:
    streams = [
        {name: tokens._replace(x=values[name]) for name, tokens in streams.items()}
        for streams, values in zip((outputs.encoded, outputs.fused), x)
    ]
    return outputs._replace(encoded=streams[0], fused=streams[1])
