"""A schedule: which mechanism each layer is, as data."""

import dataclasses
import itertools
from collections.abc import Mapping

import flax.linen as nn

from vmm.build import make
from vmm.errors import UserError, one_of
from vmm.fusion.enter import Enter, Leave
from vmm.fusion.late import Late
from vmm.layers import regularise
from vmm.types import Streams


def kinds() -> dict:
    """Returns what a layer can be: "none" (each stream in its own block), or a kind of FUSIONS."""
    from vmm.fusion import FUSIONS  # the table holds Schedule too: it is whole only once all is imported

    return {"none": Late} | {kind: fusion for kind, fusion in FUSIONS.items() if kind not in ("late", "schedule")}


class Schedule(nn.Module):
    """Layers of several kinds, one after the other: ("none",) * 8 + ("bottleneck",) * 4.

    A run of equal kinds is one fusion of that depth, without the entrance and the norms at its end: scanned as one,
    and what it carries (bottlenecks, latents) starts anew in each run. fields: kind → the mechanism's own fields.
    FLOPs forward: the sum of the runs'.
    """

    width: int
    layers: tuple[str, ...]
    heads: int
    ratio: float = 4.0
    scan: bool = False
    remat: bool | str = False
    block: Mapping = dataclasses.field(default_factory=dict)
    fields: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        known = kinds()
        if not self.layers:
            raise UserError(f"trunk.fusion.layers: none given; {one_of('', known)}")
        for kind in set(self.fields) - set(self.layers) & set(known):
            raise UserError(f"trunk.fusion.fields.{kind}: no layer is of that kind; take it out or name it in layers")
        for key, named in (("layers", self.layers), ("fields", self.fields)):
            for kind in named:
                if kind not in known:
                    raise UserError(f"trunk.fusion.{key}: unknown kind {kind!r}; {one_of(kind, known)}")
        streams = Enter(self.width, name="enter")(streams)
        shared = dict(heads=self.heads, ratio=self.ratio, scan=self.scan, remat=self.remat, block=self.block)
        before = 0
        for i, (kind, run) in enumerate(itertools.groupby(self.layers)):
            depth = len(list(run))
            given = dict(width=self.width, depth=depth, name=f"run_{i}", **shared)
            fusion = make(known[kind], self.fields.get(kind, {}), f"trunk.fusion.fields.{kind}", **given)
            with regularise.run_of(before, len(self.layers)):
                streams = fusion(streams, edges=False)
            before += depth
        return Leave(self.block.get("epsilon", 1e-6), name="leave")(streams)
