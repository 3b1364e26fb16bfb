"""The groups of a whole config, and what is known of each: the one place that knows which parts a config has."""

import dataclasses
from collections.abc import Mapping

from vmm import perturb
from vmm.data.samples import Data
from vmm.evals import EVALS
from vmm.model import Trunk
from vmm.objectives import OBJECTIVES
from vmm.settings import config_fields, filled, setting, setting_of
from vmm.sharding import MeshShape
from vmm.training.early import Early
from vmm.training.guard import Guard
from vmm.training.optim import Optim


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says that no record of the run tells, as Markdown; "" is said to be unknown."""

    licence: str = setting("unknown", "Of the weights, by its name on the Hub.")
    data_licence: str = setting("", "Of the training data.")
    intended_use: str = setting("", "What the model is for.")
    out_of_scope: str = setting("", "What the model is not for.")
    limits: str = setting("", "What it is known to do badly.")
    base_model: str = setting("", "The Hub's name of what init_from names.")


@dataclasses.dataclass(frozen=True)
class Config:
    """The groups of a config file."""

    steps: int = setting(text="Training steps.")
    batch: int = setting(text="Clips in a step, over all devices.")
    data: Mapping = setting(text="Training clips and how they are read.", group=Data)
    trunk: Mapping = setting(text="Encoders and fusion.", group=Trunk)
    views: Mapping = setting(text="Passes through the trunk: which tokens are shown, and whose parameters see them.")
    objectives: Mapping = setting(text="What is trained: name to objective.", table=OBJECTIVES, each=True)
    optim: Mapping = setting({}, "The optimizer and its schedule.", group=Optim)
    mesh: Mapping | str = setting(
        {}, 'Devices along each mesh axis, or "auto": chosen by memory.', group=MeshShape, numerics=False
    )
    evals: Mapping = setting(
        {}, "Evaluators of `vmm eval` and of training: name to evaluator.", table=EVALS, each=True, numerics=False
    )
    seed: int = setting(0, "Of parameters, order of clips and masks.")
    dtype: str = setting("float32", "What activations are computed in: float32 or bfloat16.")
    save_every: int = setting(1000, "Steps between checkpoints.", numerics=False)
    keep: int = setting(2, "Checkpoints that stay.", numerics=False)
    log_every: int = setting(10, "Steps between lines of metrics.", numerics=False)
    health: int = setting(0, "Steps between lines with the health panel (training/health.py); 0: none.", numerics=False)
    balance: str = setting("fixed", "How losses are summed: fixed, gradient or uncertainty.")
    eval_every: int = setting(0, "Steps between evaluations while training; 0: none.", numerics=False)
    step_timeout: float = setting(
        600.0,
        "Seconds after which a step that does not end ends the run with exit code 6, ten times that for the first step "
        "and for evaluations; 0: never.",
        numerics=False,
    )
    guard: Mapping = setting({}, "When a step is skipped, and when the run goes back.", group=Guard)
    check_replicas: int = setting(
        0, "Steps between comparisons of the copies that devices hold of one array; 0: none.", numerics=False
    )
    init_from: str | Mapping = setting(
        {},
        "Weights that a new run starts from: what vmm.load takes, for all parameters of the same names; or modality to "
        "such a source, for one encoder each.",
    )
    adapt: tuple = setting(
        (),
        "Ordered (regex, adapter) over parameter paths. With any, only adapters and the objectives' heads are trained, "
        "unless optim.rate_rules say what is.",
    )
    card: Mapping = setting({}, "What a model card says that no record of the run tells.", group=Card, numerics=False)
    early: Mapping = setting({}, "When the run ends before its last step.", group=Early, numerics=False)
    adversary: Mapping = setting(
        {},
        "The loss under small changes of encoded streams too; empty: without.",
        group=perturb.Adversary,
        optional=True,
    )
    other_data: bool = setting(
        False,
        "Whether a run may go on though its training clips, or their order, are not those of its checkpoint.",
        numerics=False,
    )


def numbers(config: Mapping) -> dict:
    """Returns the part of a config that the numbers of its run depend on."""

    def kept(group: Mapping, cls: type) -> dict:
        fields = config_fields(cls)
        return {key: value for key, value in group.items() if key not in fields or setting_of(fields[key]).numerics}

    return kept(config, Config) | {"data": kept(config["data"], Data)}


def full(config: Mapping) -> dict:
    """Returns a config with the defaults of all that it leaves out."""
    return filled(Config, config)
