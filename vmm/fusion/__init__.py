"""Fusions: Streams → Streams, every key and token count kept.

Contract, held for every entry by tests/test_fusion.py: any set of modalities; the output of each
stream has the fusion's width; a token that is not valid (padding, or a stream that the sample
lacks) changes no output of any valid token.
"""

from vmm.fusion.bottleneck import Bottleneck
from vmm.fusion.cross import Cross
from vmm.fusion.joint import Joint
from vmm.fusion.late import Late

FUSIONS = {"late": Late, "joint": Joint, "cross": Cross, "bottleneck": Bottleneck}
