"""Fusions: Streams → Streams, every key and token count kept.

Contract, held for every entry by tests/test_fusion.py: any set of modalities; the output of each
stream has the fusion's width; a token that is not valid (padding, or a stream that the sample
lacks) changes no output of any valid token.

Learned gates (of mixed and gated) are reported as the collection "gates" of apply(..., mutable=["gates"]).
"""

from vmm.fusion.bottleneck import Bottleneck
from vmm.fusion.cross import Cross
from vmm.fusion.experts import Experts
from vmm.fusion.gated import Gated
from vmm.fusion.joint import Joint
from vmm.fusion.late import Late
from vmm.fusion.lowrank import LowRank
from vmm.fusion.mixed import Mixed
from vmm.fusion.mutual import Mutual
from vmm.fusion.perceiver import Perceiver
from vmm.fusion.schedule import Schedule
from vmm.plugins import Kinds

FUSIONS = Kinds(
    "fusions",
    {
        "late": Late,
        "joint": Joint,
        "cross": Cross,
        "bottleneck": Bottleneck,
        "mixed": Mixed,
        "mutual": Mutual,
        "gated": Gated,
        "perceiver": Perceiver,
        "lowrank": LowRank,
        "experts": Experts,
        "schedule": Schedule,
    },
)
