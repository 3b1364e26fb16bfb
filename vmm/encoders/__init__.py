"""Encoders: one modality's array → Patches → Tokens.

Contract, held for every entry by tests/test_encoders.py:

    patches(array) → Patches          cut into tokens; no parameters
    __call__(patches, keep) → Tokens  keep: int32 [B K], the tokens that are encoded; None: all

Only the kept tokens are computed; `Tokens.at` says where in the grid each belongs. A token that is
not valid changes no other token. `dtype` is what the encoder computes in.
"""

from vmm.encoders.audio import AudioEncoder
from vmm.encoders.text import TextEncoder
from vmm.encoders.video import VideoEncoder
from vmm.plugins import Kinds

ENCODERS = Kinds("encoders", {"video": VideoEncoder, "audio": AudioEncoder, "text": TextEncoder})
