"""Attention over parts of space-time: within frames, along time, within windows, by heads or by layers.

A *pattern* says which tokens see one another:

| pattern  | a token sees                                                            |
|----------|-------------------------------------------------------------------------|
| joint    | every token                                                             |
| spatial  | those of its frame                                                      |
| temporal | those of its row and column                                             |
| local    | those of its window (Swin, Liu et al. 2021; Video Swin, 2022)           |

Registers see all and are seen by all. Over a whole grid the parts are computed one by one, which is what saves FLOPs;
over some of its tokens, or over several clips in a row, a mask made of the tokens' places says the same.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from vmm.build import make
from vmm.errors import UserError, one_of
from vmm.layers import regularise
from vmm.layers.attention import Attention, attention
from vmm.layers.blocks import Block, BlockLayer, Repeat, rematerialised
from vmm.layers.dense import Dense, LayerNorm, scalar
from vmm.layers.positions import Positions, places, ravel, rotary_at
from vmm.layers.tokens import gather, prepend
from vmm.types import Patches

PATTERNS = ("local", "spatial", "temporal", "joint")  # and the order in which they share out heads
KINDS = (
    "divided",
    "dot_product",
    "factorised",
    "factorised_places",
    "joint",
    "mixed",
    "spatial",
    "temporal",
    "windowed",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of a stream [B N] lie: the registers, then tokens of a grid.

    places: int32 [B N 3], frame, row and column; −1 for a register.
    grid: (t, h, w), which bounds the places. registers: how many tokens come first that are registers, in all.
    whole: the other tokens are the whole grid, in its order.
    segment: int32 [B N], which clip of the row a token is of, below 0: padding; None: each row is one clip.
    extents: int32 [B N 3], the grid of the token's own clip. segments: clips in a row at most.
    """

    places: Any
    grid: tuple = dataclasses.field(metadata=dict(static=True))
    registers: int = dataclasses.field(default=0, metadata=dict(static=True))
    whole: bool = dataclasses.field(default=False, metadata=dict(static=True))
    segment: Any = None
    extents: Any = None
    segments: int = dataclasses.field(default=1, metadata=dict(static=True))

    def without_registers(self) -> "Layout":
        """Returns the layout of the other tokens alone."""

        def cut(array):
            return None if array is None else array[:, self.registers :]

        arrays = {name: cut(getattr(self, name)) for name in ("places", "segment", "extents")}
        return dataclasses.replace(self, registers=0, **arrays)

    def same_clip(self) -> Bool[Array, "B N N"] | None:
        """Whether two tokens are of one clip; None: all are."""
        return None if self.segment is None else self.segment[:, :, None] == self.segment[:, None, :]

    def frames(self) -> Int[Array, "B M"]:
        """The frame of each token that is no register, numbered over all clips of the row: [0, segments · t)."""
        own = self.without_registers()
        frame = own.places[..., 0]
        return jnp.maximum(frame if own.segment is None else own.segment * self.grid[0] + frame, 0)


def lay_out(patches: Patches, keep: Int[Array, "B K"] | None) -> Layout:
    """Returns where the kept tokens of patches over (t, h, w) are; keep None: all."""
    if patches.segment is None:
        at = jnp.broadcast_to(jnp.arange(patches.valid.shape[1], dtype=jnp.int32), patches.valid.shape)
        return Layout(places(at if keep is None else keep, patches.grid), patches.grid, whole=keep is None)
    place, segment = patches.places, patches.segment
    if keep is not None:
        place, segment = gather(place, keep), gather(segment, keep)
    extents = gather(patches.extents, jnp.maximum(segment, 0))
    return Layout(place, patches.grid, segment=segment, extents=extents, segments=patches.extents.shape[1])


def prepend_each(registers: Float[Array, "R D"], x, valid, at, layout: Layout) -> tuple:
    """As prepend, also of the layout: (x, valid, at, layout). Each of the clips in a row has registers of its own."""
    count, segments = registers.shape[0], layout.segments
    clip = jnp.zeros_like(at) if layout.segment is None else layout.segment
    there = ((clip[:, None] == jnp.arange(segments)[:, None]) & valid[:, None]).any(-1)
    x, _, at = prepend(jnp.tile(registers, (segments, 1)), x, valid, at)
    valid = jnp.concatenate([jnp.repeat(there, count, axis=1), valid], axis=1)

    def put(first, array):
        return jnp.concatenate([first.astype(array.dtype), array], axis=1)

    batch, total = valid.shape[0], count * segments
    arrays = dict(places=put(jnp.full((batch, total, 3), -1), layout.places))
    if layout.segment is not None:
        clips = jnp.repeat(jnp.arange(segments), count)
        arrays |= dict(segment=put(jnp.broadcast_to(clips, (batch, total)), layout.segment))
        arrays |= dict(extents=put(jnp.zeros((batch, total, 3)), layout.extents))
    return x, valid, at, dataclasses.replace(layout, registers=total, **arrays)


def windows(window: Sequence[int], extent, count) -> tuple:
    """Returns (sizes, shifts) of windows along the axes of a grid: no larger than it, not shifted where as large.

    extent: the grid, or int32 [... 3]. count: windowed layers before this one; every other is shifted by half.
    """
    static = isinstance(extent, Sequence)
    extents = extent if static else [extent[..., axis] for axis in range(len(window))]
    sizes = [(min if static else jnp.minimum)(size, have) for size, have in zip(window, extents)]
    return sizes, [(count % 2) * (size // 2) * (size < have) for size, have in zip(window, extents)]


def seen(pattern: str, layout: Layout, window: Sequence[int], count=0) -> Bool[Array, "B N N"]:
    """Returns which tokens see which, by a pattern. window, count: see windows."""
    frame, row, column = (layout.places[..., axis] for axis in range(3))
    if pattern == "joint":
        parts = []
    elif pattern == "spatial":
        parts = [frame]
    elif pattern == "temporal":
        parts = [row, column]
    else:
        sizes, shifts = windows(window, layout.grid if layout.extents is None else layout.extents, count)
        axes = zip((frame, row, column), sizes, shifts)
        parts = [(place + shift) // jnp.maximum(size, 1) for place, size, shift in axes]
    mask = jnp.ones((*frame.shape, frame.shape[1]), bool)
    for part in parts:
        mask &= part[:, :, None] == part[:, None, :]
    register = frame < 0
    mask |= register[:, :, None] | register[:, None, :]
    return mask if layout.segment is None else mask & layout.same_clip()


def spacetime_attention(
    pattern: str,
    query: Float[Array, "B N A d"],
    key: Float[Array, "B N A d"],
    value: Float[Array, "B N A d"],
    valid: Bool[Array, "B N"],
    layout: Layout,
    window: Sequence[int] = (8, 7, 7),
    count=0,
    cap: float = 0.0,
    by_frame: bool = False,
) -> Float[Array, "B N A d"]:
    """Attention by a pattern: what `attention` gives under the mask of `seen`.

    window, count: see windows. by_frame: a register attends to each frame alone, and takes the mean over the frames
    that have a valid token (TimeSformer's class token); else to all tokens.

    FLOPs forward a sample, of M = t h w tokens and R registers, D = A d: 4 D (M (n + R) + R (M + R)) with n = h w for
    spatial, t for temporal, M for joint, and for local the window's size (M being then that of whole windows);
    t R (h w + R) instead of R (M + R) by_frame. n = M where the layout is not whole, t R (M + R) by_frame.
    """
    if pattern == "joint":
        mask = layout.same_clip()
        return attention(query, key, value, valid, None if mask is None else mask[:, None], cap)
    if layout.whole:
        return _by_parts(pattern, query, key, value, valid, layout, window, count, cap, by_frame)
    mask, registers = seen(pattern, layout, window, count)[:, None], layout.registers
    if not registers or not by_frame:
        return attention(query, key, value, valid, mask, cap)
    # A query for each register and frame, over the keys of the frame and the registers.
    frames = layout.grid[0]
    frame = layout.places[:, None, None, :, 0]
    inside = frame == jnp.arange(frames)[:, None]
    if layout.segment is not None:
        inside &= layout.same_clip()[:, :registers, None]
    inside = jnp.broadcast_to(inside, (query.shape[0], registers, frames, query.shape[1]))
    allowed = inside | mask[:, 0, :registers, None] & (frame < 0)
    each = attention(
        repeat(query[:, :registers], "b r a d -> b (r t) a d", t=frames),
        key,
        value,
        valid,
        rearrange(allowed, "b r t k -> b 1 (r t) k"),
        cap,
    )
    first = _mean(rearrange(each, "b (r t) a d -> b t r a d", t=frames), (inside & valid[:, None, None]).any(-1))
    tokens = attention(query[:, registers:], key, value, valid, mask[:, :, registers:], cap)
    return jnp.concatenate([first, tokens], axis=1)


def _mean(x: Float[Array, "B t R A d"], there: Bool[Array, "B R t"]) -> Float[Array, "B R A d"]:
    """The mean over frames, of those that are there."""
    weight = there.swapaxes(1, 2)[..., None, None].astype(jnp.float32)
    return ((x.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)).astype(x.dtype)


def _by_parts(pattern, query, key, value, valid, layout, window, count, cap, by_frame):
    """spacetime_attention over a whole grid: G parts of n tokens, each with the registers as further keys."""
    registers = layout.registers
    split, join, mask = _parts(pattern, layout.grid, window, count)
    query_parts, key_parts, value_parts = (split(x[:, registers:]) for x in (query, key, value))
    there = split(valid[:, registers:])
    alive = there.any(-1)[:, None]
    batch, count_parts = there.shape[:2]

    def with_registers(x, parts):
        own = jnp.broadcast_to(x[:, None, :registers], (batch, count_parts, registers, *x.shape[2:]))
        return jnp.concatenate([own, parts], axis=2)

    if registers:
        key_parts, value_parts = with_registers(key, key_parts), with_registers(value, value_parts)
        there = with_registers(valid, there)
        query_parts = with_registers(query, query_parts) if by_frame else query_parts
        mask = None if mask is None else jnp.pad(mask, ((0, 0), (0, 0), (registers, 0)), constant_values=True)
    each = jax.vmap(lambda *part: attention(*part, cap), (1, 1, 1, 1, None if mask is None else 0), 1)
    mixed = each(query_parts, key_parts, value_parts, there, mask)
    if not registers:
        return join(mixed)
    if by_frame:
        first = _mean(mixed[:, :, :registers], jnp.broadcast_to(alive, (batch, registers, count_parts)))
        return jnp.concatenate([first, join(mixed[:, :, registers:])], axis=1)
    return jnp.concatenate([attention(query[:, :registers], key, value, valid, None, cap), join(mixed)], axis=1)


def _parts(pattern: str, grid: tuple, window: Sequence[int], count) -> tuple:
    """Returns (split [B M ...] → [B G n ...], join its inverse, mask [G n n] or None) of a pattern's parts."""
    t, h, w = grid
    if pattern == "spatial":
        return (
            lambda x: x.reshape(x.shape[0], t, h * w, *x.shape[2:]),
            lambda x: x.reshape(x.shape[0], t * h * w, *x.shape[3:]),
            None,
        )
    if pattern == "temporal":
        return (
            lambda x: x.reshape(x.shape[0], t, h * w, *x.shape[2:]).swapaxes(1, 2),
            lambda x: x.swapaxes(1, 2).reshape(x.shape[0], t * h * w, *x.shape[3:]),
            None,
        )
    sizes, shifts = windows(window, grid, count)
    whole = [-(-have // size) * size for have, size in zip(grid, sizes)]
    still = all(isinstance(shift, int) and not shift for shift in shifts)
    names = dict(zip("pqr", sizes), t=whole[0] // sizes[0], h=whole[1] // sizes[1], w=whole[2] // sizes[2])

    def roll(x, sign: int):
        return x if still else jnp.roll(x, jnp.stack([jnp.asarray(sign * shift) for shift in shifts]), (1, 2, 3))

    def windowed(x):
        return rearrange(x, "b (t p) (h q) (w r) ... -> b (t h w) (p q r) ...", **names)

    def split(x):
        x = x.reshape(x.shape[0], *grid, *x.shape[2:])
        pads = [(0, more - have) for have, more in zip(grid, whole)]
        return windowed(roll(jnp.pad(x, [(0, 0), *pads, *[(0, 0)] * (x.ndim - 4)]), 1))

    def join(x):
        x = rearrange(x, "b (t h w) (p q r) ... -> b (t p) (h q) (w r) ...", **names)
        return roll(x, -1)[:, :t, :h, :w].reshape(x.shape[0], t * h * w, *x.shape[4:])

    if still:
        return split, join, None
    # Turned round, shifted windows are as many as the others; what came over the seam is held apart.
    seam = [jnp.arange(size) < shift for size, shift in zip(whole, shifts)]
    side = seam[0][:, None, None] + 2 * seam[1][:, None] + 4 * seam[2]
    side = windowed(side[None])[0]
    return split, join, side[:, :, None] == side[:, None, :]


class SpaceTimeAttention(Attention):
    """Attention whose heads are shared out between patterns; its other parameters are Attention's.

    shares: (pattern, heads) …, all the heads in all. gated: what a pattern's heads give is scaled by 2 σ(g), of a
    learned g that begins at 0: by 1; sown as collection "gates" where a caller asks for it. window, by_frame: see
    spacetime_attention. The call's mask is (Layout, count).
    """

    shares: tuple = ()
    window: tuple[int, int, int] = (8, 7, 7)
    gated: bool = False
    by_frame: bool = False

    def mix(self, query, key, value, valid, mask) -> Float[Array, "B N A d"]:
        """Returns the heads' results, each by its own pattern."""
        (layout, count), parts, first = mask, [], 0
        for pattern, heads in self.shares:
            mine = (x[:, :, first : first + heads] for x in (query, key, value))
            part = spacetime_attention(
                pattern, *mine, valid, layout, self.window, count, self.cap, by_frame=self.by_frame
            )
            if self.gated:
                gate = 2.0 * nn.sigmoid(scalar(self, f"gate_{pattern}", 0.0))
                if self.is_mutable_collection("gates") and not self.is_initializing():
                    self.sow("gates", pattern, gate)
                part = part * gate.astype(part.dtype)
            parts.append(part)
            first += heads
        return jnp.concatenate(parts, axis=2)


class SpaceTimeBlock(Block):
    """A Block over space-time. The call's mask is (Layout, count), as in SpaceTimeAttention; there is no context.

    divided: attention along time comes first, with a norm and a further linear map of its own; registers take part
    in the attention within frames only, once a frame (TimeSformer, Bertasius et al. 2021, eq. 5 and 6).

    FLOPs forward a sample: those of Block with spacetime_attention's in the place of 4 N² D; divided: 10 M D² and
    the temporal attention's 4 M t D more, of M tokens that are no registers.
    """

    shares: tuple = ()
    window: tuple[int, int, int] = (8, 7, 7)
    gated: bool = False
    divided: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        valid: Bool[Array, "B N"],
        context: None = None,
        context_valid: None = None,
        mask: tuple | None = None,
        rotary: tuple | None = None,
    ) -> Float[Array, "B N D"]:
        if self.divided:
            layout, count = mask
            cut = layout.registers
            norm = LayerNorm(self.epsilon, name="norm_temporal")
            along = SpaceTimeAttention(self.heads, self.cap, 0, (("temporal", self.heads),), name="attention_temporal")
            out = Dense(x.shape[-1:], ("embed", None), name="temporal_out")
            tokens, turn = x[:, cut:], None if rotary is None else tuple(part[:, cut:] for part in rotary)
            own = (layout.without_registers(), count)
            y = out(along(norm(tokens) if self.norm == "pre" else tokens, None, valid[:, cut:], own, turn))
            tokens = tokens + regularise.dropped(self, "temporal", y, self.dropout, self.drop_path)
            tokens = tokens if self.norm == "pre" else norm(tokens)
            x = jnp.concatenate([x[:, :cut], tokens], axis=1)
        return super().__call__(x, valid, mask=mask, rotary=rotary)

    def attend(self, name: str) -> Attention:
        """Returns the block's attention by patterns."""
        fields = (self.heads, self.cap, self.prefix, self.shares, self.window, self.gated, self.divided)
        return SpaceTimeAttention(*fields, name=name)


class SpaceTimeLayer(nn.Module):
    """A SpaceTimeBlock as a layer of Repeat.

    plan: its shares, gated and divided. The carry is (x [B N D], windowed layers before this one), the constants
    validity [B N], Layout and rotary.
    """

    heads: int
    ratio: float
    block: Mapping
    plan: Mapping
    window: tuple[int, int, int]

    @nn.compact
    def __call__(self, carry, constants):
        (x, count), (valid, layout, rotary) = carry, constants
        given = dict(heads=self.heads, ratio=self.ratio, window=self.window, name="block", **self.plan)
        x = make(SpaceTimeBlock, self.block, "block", **given)(x, valid, mask=(layout, count), rotary=rotary)
        if self.is_mutable_collection("layers") and not self.is_initializing():
            self.sow("layers", "x", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return x, count + any(pattern == "local" for pattern, _ in self.plan["shares"])


def make_plan(spec: str | Mapping, heads: int) -> dict:
    """Returns SpaceTimeBlock's shares, gated and divided for one layer's kind of attention.

    Raises:
      UserError: an unknown kind, or heads that it cannot share out.
    """
    spec = {"kind": spec} if isinstance(spec, str) else spec
    kind, known = spec.get("kind"), [kind for kind in KINDS if not kind.startswith("factorised")]
    if kind in KINDS and kind not in known:
        raise UserError(f"attention: {kind!r} is of a whole encoder, not of a layer in a list; {one_of('', known)}")
    if kind not in known:
        raise UserError(f"attention: unknown kind {kind!r} of a layer; {one_of(kind, KINDS)}")
    for key in spec:
        if key != "kind" and not (key == "heads" and kind == "mixed"):
            raise UserError(f"attention.{key}: no such key of {kind!r}; only 'mixed' has one, heads")
    plan = dict(gated=kind == "mixed", divided=kind == "divided")
    if kind == "mixed":
        shares = spec.get("heads", {})
        unknown = [pattern for pattern in shares if pattern not in PATTERNS]
        if unknown:
            raise UserError(f"attention.heads.{unknown[0]}: no such pattern; {one_of(unknown[0], PATTERNS)}")
        if sum(shares.values()) != heads or min(shares.values()) < 0:
            raise UserError(f"attention.heads: {dict(shares)} share out {sum(shares.values())} heads, not {heads}")
        return dict(shares=tuple((pattern, shares[pattern]) for pattern in PATTERNS if shares.get(pattern)), **plan)
    if kind == "dot_product":
        if heads % 2:
            raise UserError(f"attention: 'dot_product' halves the heads, and {heads} is odd")
        return dict(shares=(("spatial", heads // 2), ("temporal", heads // 2)), **plan)
    pattern = {"divided": "spatial", "windowed": "local"}.get(kind, kind)
    return dict(shares=((pattern, heads),), **plan)


class Layers(nn.Module):
    """Layers of several kinds one after the other: layer_0, layer_1, …; scanned, a Repeat for each run of one kind.

    fields: one mapping a layer, of SpaceTimeLayer. scan, remat: see Repeat. carry, constants: see SpaceTimeLayer.
    """

    fields: tuple
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(self, carry, constants):
        if not self.scan:
            layer = rematerialised(SpaceTimeLayer, self.remat, scan=False)
            for i, fields in enumerate(self.fields):
                with regularise.layer(i, len(self.fields)):
                    carry = layer(**fields, name=f"layer_{i}")(carry, constants)
            return carry
        runs = [(fields, len(list(run))) for fields, run in itertools.groupby(self.fields)]
        before = 0
        for i, (fields, depth) in enumerate(runs):
            row = (before, len(self.fields) - before - depth)
            carry = Repeat(SpaceTimeLayer, fields, depth, True, self.remat, *row, name=f"run_{i}")(carry, constants)
            before += depth
        return carry


class SpaceTimeStack(nn.Module):
    """Blocks of attention over space-time and a final norm: x [B N D], valid [B N] → [B N D].

    attention: one of KINDS, a mapping of the kind "mixed", or a tuple of these, one a layer:
      "divided": along time, then within frames, in each block (TimeSformer, Bertasius et al. 2021).
      "spatial", "temporal", "joint": by that pattern alone. "windowed": local, every other layer shifted by half.
      "dot_product": half the heads spatial, half temporal (ViViT model 4, Arnab et al. 2021).
      dict(kind="mixed", heads={pattern: heads, …}): heads shared out between patterns, with a learned gate each.
      "factorised" (ViViT model 2): the last temporal_depth layers are a Transformer over the frames' mean tokens
      and the registers; a token then gets what its frame's mean became, less the mean: x + (y − mean). The mean
      over tokens is ViViT's pooled output where frames have as many.
      "factorised_places" (VideoPrism, Zhao et al. 2024): the last temporal_depth layers attend along time at each
      place, after a norm.
    positions: of a rotary kind, else nothing is turned; where they are "places", factorised_places adds "frames" to
    them before the layers over time. Others as Stack.

    FLOPs forward: depth · block; factorised: (depth − temporal_depth) · spatial block + temporal_depth · block of
    t + R tokens.
    """

    depth: int
    heads: int
    ratio: float = 4.0
    scan: bool = False
    remat: bool | str = False
    block: Mapping = dataclasses.field(default_factory=dict)
    final_norm: bool = True
    attention: str | Mapping | tuple = "divided"
    window: tuple[int, int, int] = (8, 7, 7)
    temporal_depth: int = 0
    positions: str = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], layout: Layout) -> Float[Array, "B N D"]:
        factorised = self.attention in ("factorised", "factorised_places")
        kinds = ("spatial",) * (self.depth - self.temporal_depth) if factorised else self.attention
        kinds = kinds if isinstance(kinds, tuple) else (kinds,) * self.depth
        if not factorised and len(kinds) != self.depth:
            raise UserError(f"attention: {len(kinds)} kinds for {self.depth} layers; give one a layer, or one for all")
        if factorised != bool(self.temporal_depth) or self.temporal_depth > self.depth:
            raise UserError(
                f"temporal_depth: {self.temporal_depth} of {self.depth} layers; 'factorised' and 'factorised_places' need "
                "one or more, others have none"
            )
        if min(self.window) < 1:
            raise UserError(f"window: {self.window} (frames, rows, columns); each must be 1 or more")
        turn = rotary_at(self.positions, layout.places, x.shape[-1] // self.heads)
        common = dict(heads=self.heads, ratio=self.ratio, block=self.block, window=self.window)
        fields = tuple(dict(common, plan=make_plan(kind, self.heads)) for kind in kinds)
        carry, constants = (x, jnp.int32(0) if self.scan else 0), (valid, layout, turn)
        if all(field == fields[0] for field in fields[1:]) and fields:
            row = (0, self.temporal_depth)
            layers = Repeat(SpaceTimeLayer, fields[0], len(fields), self.scan, self.remat, *row, name="blocks")
        else:
            layers = Layers(fields, self.scan, self.remat, name="blocks")
        x, count = layers(carry, constants)
        epsilon = self.block.get("epsilon", 1e-6)
        if factorised:
            if self.final_norm:
                x = LayerNorm(epsilon, name="norm_spatial")(x)
            if self.attention == "factorised":
                return self._over_frames(x, valid, layout, epsilon)
            own = None if layout.segment is None else (layout.places, layout.extents)
            added = Positions("frames" if self.positions == "places" else "none", name="positions")
            x = added(x, ravel(layout.places, layout.grid), layout.grid, own)
            fields = dict(common, plan=make_plan("temporal", self.heads))
            row = (self.depth - self.temporal_depth, 0)
            along = Repeat(SpaceTimeLayer, fields, self.temporal_depth, self.scan, self.remat, *row, name="temporal")
            x, _ = along((x, count), constants)
        return LayerNorm(epsilon, name="norm")(x) if self.final_norm else x

    def _over_frames(self, x, valid, layout, epsilon):
        cut, batch = layout.registers, x.shape[0]
        tokens, there = x[:, cut:].astype(jnp.float32), valid[:, cut:]
        count = layout.grid[0] * layout.segments
        frame = layout.frames()
        if layout.whole:
            weight = there.reshape(batch, count, -1).astype(jnp.float32)
            number = weight.sum(-1)
            total = (tokens.reshape(batch, count, -1, tokens.shape[-1]) * weight[..., None]).sum(2)
        else:
            weight = there.astype(jnp.float32)
            number = jnp.zeros((batch, count)).at[jnp.arange(batch)[:, None], frame].add(weight)
            total = jnp.zeros((batch, count, tokens.shape[-1]))
            total = total.at[jnp.arange(batch)[:, None], frame].add(tokens * weight[..., None])
        mean = (total / jnp.maximum(number, 1.0)[..., None]).astype(x.dtype)
        # The Transformer over time: registers, then frames, each at (time, 0, 0).
        time = jnp.tile(jnp.arange(layout.grid[0], dtype=jnp.int32), layout.segments)
        places = jnp.stack([time, jnp.zeros_like(time), jnp.zeros_like(time)], axis=-1)
        places = jnp.concatenate([layout.places[:, :cut], jnp.broadcast_to(places, (batch, *places.shape))], axis=1)
        mask = None
        if layout.segment is not None:
            clip = jnp.repeat(jnp.arange(layout.segments), layout.grid[0])
            clip = jnp.concatenate([layout.segment[:, :cut], jnp.broadcast_to(clip, (batch, count))], axis=1)
            mask = (clip[:, :, None] == clip[:, None, :])[:, None]
        y = jnp.concatenate([x[:, :cut], mean], axis=1)
        y_valid = jnp.concatenate([valid[:, :cut], number > 0], axis=1)
        turn = rotary_at(self.positions, places, x.shape[-1] // self.heads)
        fields = dict(heads=self.heads, ratio=self.ratio, block=self.block)
        row = (self.depth - self.temporal_depth, 0)
        layers = Repeat(BlockLayer, fields, self.temporal_depth, self.scan, self.remat, *row, name="temporal")
        y = layers(y, (y_valid, mask, turn))
        y = LayerNorm(epsilon, name="norm")(y) if self.final_norm else y
        change = jnp.take_along_axis(y[:, cut:] - mean, frame[..., None], axis=1)
        return jnp.concatenate([y[:, :cut], x[:, cut:] + change], axis=1)
