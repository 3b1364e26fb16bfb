"""Captioning: a text, token by token, from the streams of a clip (CoCa, Yu et al. 2022; BLIP, Li et al. 2022)."""

import dataclasses
from collections.abc import Collection, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vmm import losses
from vmm.data.spec import DataSpec
from vmm.errors import UserError, one_of
from vmm.objectives.base import Generates, Objective, Prediction
from vmm.objectives.writing import Writer, beam_search
from vmm.types import Batch, Outputs, Streams


class Captioning(Objective, Generates):
    """Prediction of each token of a text from the tokens before it and from streams of the clip.

        −(1/n) Σ_i log p(y_i | y_1 … y_{i−1}, context),  over the n tokens of the batch that are no padding

    The text is that of the stream of text, or, with `writes`, a target of the batch: an answer, say, to the question that
    is the stream of text, or subtitles. The stream's own text is taken from the batch, not from the trunk, and must not
    come in with the streams: they are read as encoded, before any fusion. stage "fused" asks for a trunk that keeps it apart, or a
    view that hides all of it (a mask of ratio 1): then no other stream can have seen it. A target is in no stream, so that context may be all
    of them, encoded or fused.

    view, weight: see Recipe. text: the modality that is written. writes: name of data.targets of kind text or subtitles that
    is written in its place. choices: name of data.targets of kind choices, of which `predict` tells how likely each
    is; mean: a token, not the whole text. context: streams it is written from; a sample with none of them does not count.
    stage: "encoded" or "fused". width, depth, heads, ratio, positions: of the decoder. block: further fields of
    layers.Block. vocabulary, padding: of the tokenizer, for targets; vocabulary 0: that of the stream of text.
    """

    view: str = "clean"
    weight: float = 1.0
    text: str = "text"
    writes: str = ""
    choices: str = ""
    mean: bool = False
    context: tuple[str, ...] = ("video", "audio")
    stage: str = "encoded"
    width: int = 256
    depth: int = 2
    heads: int = 4
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    vocabulary: int = 0
    padding: int = 0

    def check(self, where: str, data: DataSpec) -> None:
        """Raises UserError where a target is written that the tokenizer's ids do not fit."""
        known = data.tokenizer if self.writes else None
        if known and (0 < self.vocabulary < known.vocabulary or self.padding != known.padding):
            raise UserError(
                f"{where}: vocabulary must be {known.vocabulary} or more and padding {known.padding}, as {known.path} has "
                "them"
            )

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Log-likelihoods of tokens and choices; logits of the next token."""
        return Prediction("log" if key in ("tokens", "choices") else "softmax")

    @property
    def needs_hidden(self) -> bool:
        """Whether predict needs a view that hides something."""
        return self.stage == "fused" and not self.writes

    def _context(self, outputs: Outputs) -> Streams:
        if self.stage not in ("encoded", "fused"):
            raise UserError(f"captioning.stage: unknown {self.stage!r}; known: encoded, fused")
        known = sorted(outputs.patches)
        wanted = self.context if self.writes else (*self.context, self.text)
        if [name for name in wanted if name not in known] or not self.context:
            raise UserError(
                f"captioning: a text is written from streams of the trunk; it has {known}, context is {self.context}"
            )
        if not self.writes:
            self._check_stream(outputs)
        return {name: getattr(outputs, self.stage)[name] for name in self.context}

    def _check_stream(self, outputs: Outputs) -> None:
        if self.text in self.context:
            raise UserError(
                f"captioning: {self.text!r} is written from one stream or more of the trunk, itself not among them; "
                f"the trunk has {sorted(outputs.patches)}, context is {self.context}; to write another text, name its target (writes)"
            )
        if not outputs.patches[self.text].classes:
            raise UserError(f"captioning.text: {self.text!r} is no stream of token ids")
        mask = outputs.masks.get(self.text)
        if self.stage == "fused" and self.text in outputs.fused and (mask is None or mask.keep.shape[1]):
            raise UserError(
                f"captioning.stage: fused streams have seen the text that the view {self.view!r} shows; set "
                f"trunk.apart=({self.text!r},), give views.{self.view}.{self.text} a mask of ratio 1, or read the encoded streams"
            )

    def _text(self, outputs: Outputs, batch: Batch) -> tuple[Array, Array]:
        """Returns the ids [B L] to be written, and which are no padding."""
        if not self.writes:
            return outputs.patches[self.text].values, outputs.patches[self.text].valid
        ids = self._target(batch, "writes", self.writes, 2)
        return ids, ids != self.padding

    def _target(self, batch: Batch, field: str, name: str, axes: int) -> Array:
        if name not in batch.targets:
            raise UserError(f"captioning.{field}: no target {name!r} in data.targets; {one_of(name, batch.targets)}")
        ids = batch.targets[name]
        if not hasattr(ids, "ndim") or ids.ndim != axes or not jnp.issubdtype(ids.dtype, jnp.integer):
            kinds = "text or subtitles" if axes == 2 else "choices"
            raise UserError(f"captioning.{field}: the target {name!r} holds no token ids; its kind must be {kinds}")
        return ids

    def _fields(self, outputs: Outputs) -> tuple:
        patches = outputs.patches.get(self.text)
        vocabulary = (self.writes and self.vocabulary) or (patches.classes if patches is not None else 0)
        if not vocabulary:
            raise UserError(
                "captioning.vocabulary: the trunk has no stream of text to take it from; give the tokenizer's size"
            )
        return vocabulary, self.width, self.depth, self.heads, self.ratio, self.positions, self.block

    @nn.compact
    def _write(self, outputs: Outputs, ids: Int[Array, "B L"], valid: Bool[Array, "B L"], context: Streams):
        return Writer(*self._fields(outputs), name="decoder")(ids, valid, context)

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns text → logits float32 [B L V] of each token, given those before it.

        With `writes`: tokens → log-probability float32 [B L] of each token of the target, 0 where it has none; with
        `choices`: choices → that of each choice [B C], −inf where there is none.
        """
        context, (ids, valid) = self._context(outputs), self._text(outputs, batch)
        logits = self._write(outputs, ids, valid, context)
        result = {}
        if self.writes:
            result["tokens"] = -losses.cross_entropy(logits, ids) * valid
        else:
            result[self.text] = logits
        if self.choices:
            result["choices"] = self._choose(outputs, batch, context)
        return result

    def _choose(self, outputs: Outputs, batch: Batch, context: Streams) -> Array:
        ids = self._target(batch, "choices", self.choices, 3)
        count, flat = ids.shape[1], ids.reshape(-1, ids.shape[2])
        valid = flat != self.padding
        context = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), context)
        said = -losses.cross_entropy(self._write(outputs, flat, valid, context), flat) * valid
        tokens = valid.sum(1)
        total = said.sum(1) / (jnp.maximum(tokens, 1) if self.mean else 1)
        return jnp.where(tokens > 0, total, -jnp.inf).reshape(-1, count)

    def generate(
        self, outputs: Outputs, batch: Batch, end: int, length: int = 0, beams: int = 1, penalty: float = 0.0
    ) -> dict:
        """Returns ids → the text that beam search finds, int32 [B L], and likelihood → its log-probability [B].

        Keys and values of the tokens before are kept: a token costs one pass of one token, for each of the texts in work.

        Args:
          end: id that ends a text; behind it stands padding.
          length: tokens at most, 0: as many as the batch's texts have.
          beams, penalty: see writing.beam_search.
        """
        context, (ids, _) = self._context(outputs), self._text(outputs, batch)
        rows, most = ids.shape
        length = min(length or most, most)
        dtype = next(iter(context.values())).x.dtype.name
        writer = Writer(*self._fields(outputs), recall=most, dtype=dtype, parent=None)
        params = {"params": self.variables["params"]["decoder"]}
        there = jnp.ones((rows, beams), bool)
        blank = jnp.zeros((rows, beams), jnp.int32)
        logits, memory = writer.apply(params, blank, there, context, 0, mutable=["told", "written"])
        told = {**params, "told": memory["told"]}

        def step(written, tokens, place):
            logits, changed = writer.apply({**told, "written": written}, tokens, there, {}, place, mutable=["written"])
            return logits, changed["written"]

        padding = self.padding if self.writes else 0
        ids, score = beam_search(step, memory["written"], logits, length, end, padding, penalty)
        return {"ids": ids, "likelihood": score}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the sum of errors over its tokens, how many it gets right, and their number."""
        context, (ids, valid) = self._context(outputs), self._text(outputs, batch)
        logits = self._write(outputs, ids, valid, context)
        told = jnp.stack([tokens.valid.any(1) for tokens in context.values()]).any(0) & batch.valid
        weight = (valid & told[:, None]).astype(jnp.float32)
        right = logits.argmax(-1) == ids
        return {
            "error": (losses.cross_entropy(logits, ids) * weight).sum(1),
            "right": (right * weight).sum(1),
            "count": weight.sum(1),
        }

    def loss(self, features: dict) -> tuple:
        """Returns the mean cross-entropy per token of the global batch; metrics: accuracy, of next tokens."""
        count = jnp.maximum(features["count"].sum(), 1.0)
        return features["error"].sum() / count, {"accuracy": features["right"].sum() / count}
