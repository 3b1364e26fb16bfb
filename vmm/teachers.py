"""Other models that teach this one: the views of a config that name a folder, opened, checked and put on the mesh.

Their parameters are data of the step: no gradient, no checkpoint, no part of what is published.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from vmm.build import build
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.model import Trunk
from vmm.sharding import place_state
from vmm.source import open_source
from vmm.weights import parameter_tree


class Teachers(NamedTuple):
    """trunks: view → Trunk. params: () without, else (view → parameters,): what a step is given after the batch."""

    trunks: dict
    params: tuple


def open_teachers(experiment: Experiment, mesh) -> Teachers:
    """Opens the published models (or runs) that views of the experiment name; each shows it what this model takes.

    Text goes to the teacher as this model's token ids: both need the same tokenizer.

    Raises:
      UserError: there is no such model, it is not whole, or it shares no modality with this one.
    """
    trunks, params = {}, {}
    for view, spec in experiment.config.views.items():
        if not isinstance(spec.get("teacher"), str):
            continue
        source = open_source(spec["teacher"])
        trunk = dict(source.model["trunk"])
        trunk["encoders"] = {name: e for name, e in trunk["encoders"].items() if name in experiment.modalities}
        if not trunk["encoders"]:
            raise UserError(f"views.{view}.teacher: {spec['teacher']} takes none of {', '.join(experiment.modalities)}")
        dtype = experiment.config.dtype
        trunks[view] = build({"trunk": Trunk}, {"kind": "trunk", **trunk}, f"{spec['teacher']}: trunk", dtype=dtype)
        batch = experiment.batch_shapes(1)
        boxed = jax.eval_shape(
            lambda key, batch, trunk=trunks[view]: trunk.init(key, batch.inputs, batch.present, method="whole"),
            jax.random.key(0),
            batch,
        )["params"]
        shapes = nn.unbox(boxed)
        # Of a teacher with more streams, or heads, only what is shown here is taken.
        wanted = flatten_dict(shapes, sep=".")
        tensors = {name.removeprefix("model."): value for name, value in source.tensors.items()}
        tensors = {name: value for name, value in tensors.items() if name in wanted}
        # A learned table is over the grid that the teacher was made for, and resized where it is read.
        wanted |= {name: value for name, value in tensors.items() if ".positions." in name}
        params[view] = parameter_tree(tensors, unflatten_dict(wanted, sep="."), spec["teacher"])
        if mesh is not None:
            places = jax.tree.map(lambda leaf: leaf.sharding, place_state(boxed, mesh))
            params[view] = jax.device_put(params[view], places)
    return Teachers(trunks, (params,) if params else ())
