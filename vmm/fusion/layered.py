"""The shape that most fusions share: Enter → one layer, depth times → Leave."""

import dataclasses
import typing
from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Array

from vmm.fusion.enter import Enter, Leave
from vmm.layers import Repeat
from vmm.types import Streams


class Fusion(nn.Module):
    """The fields of every fusion, and the call: Streams → Streams.

    width: D. depth: layers. heads, ratio, block: as of layers.Block. scan, remat: as of layers.Repeat.
    The call's `edges` is False inside a schedule: the streams are of width D, marked, and normed later.
    """

    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    scan: bool = False
    remat: bool | str = False
    block: Mapping = dataclasses.field(default_factory=dict)

    keeps_streams = False  # whether what comes out is what went in


class Layer(nn.Module):
    """One layer of a Layered fusion: ((modality → x [B N D], carried), constants) → (modality → x, carried)."""

    heads: int
    ratio: float = 4.0
    block: Mapping = dataclasses.field(default_factory=dict)


class Layered(Fusion):
    """Enter → `layer` depth times → Leave. The layer takes its fields from the fusion's of the same name."""

    layer: typing.ClassVar[type[Layer]]

    def carried(self, batch: int, dtype) -> tuple | Array:
        """Returns what the first layer is handed besides the streams."""
        return ()

    def constants(self, streams: Streams) -> dict:
        """Returns what every layer reads: modality → valid [B N]."""
        return {name: tokens.valid for name, tokens in streams.items()}

    @nn.compact
    def __call__(self, streams: Streams, edges: bool = True) -> Streams:
        if edges:
            streams = Enter(self.width, name="enter")(streams)
        first = next(iter(streams.values())).x
        own = [field.name for field in dataclasses.fields(self.layer) if field.name not in ("parent", "name")]
        fields = {name: getattr(self, name) for name in own}
        x, _ = Repeat(self.layer, fields, self.depth, self.scan, self.remat, name="blocks")(
            ({name: tokens.x for name, tokens in streams.items()}, self.carried(first.shape[0], first.dtype)),
            self.constants(streams),
        )
        streams = {name: tokens._replace(x=x[name]) for name, tokens in streams.items()}
        return Leave(self.block.get("epsilon", 1e-6), name="leave")(streams) if edges else streams


def report(module: nn.Module, name: str, value: Array) -> None:
    """Puts a gate's value [] into the collection "gates", where the caller of apply asks for it (mutable=["gates"])."""
    if module.is_mutable_collection("gates") and not module.is_initializing():
        module.sow("gates", name, value)
