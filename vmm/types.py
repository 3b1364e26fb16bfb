"""The nouns that pass between the parts of vmm, and the letters of their axes.

| letter | meaning                         | letter | meaning                        |
|--------|---------------------------------|--------|--------------------------------|
| B      | batch (clips)                   | N      | tokens of one stream           |
| T H W C| frames, pixels, channels        | Q K    | query / key tokens; K: kept    |
| t h w  | token grid after tubelets       | Z      | bottleneck or latent tokens    |
| S      | audio samples                   | D      | model width                    |
| F M    | spectrogram frames, mel bins    | A d    | attention heads, width per head|
| L V    | text tokens, vocabulary         | E      | shared embedding width         |
| P      | values in a tubelet or patch    | Y      | labels                         |
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Shaped

MODALITIES = ("video", "audio", "text")

# First parts of the names under which a clip's predictions hold what no objective said.
TOLD = ("encoded", "fused", "hidden", "label", "present", "target")

# Every modality subset that an evaluation reports, in the order of its tables.
SUBSETS = {
    "V": ("video",),
    "A": ("audio",),
    "T": ("text",),
    "VA": ("video", "audio"),
    "VT": ("video", "text"),
    "AT": ("audio", "text"),
    "VAT": ("video", "audio", "text"),
}


class Mixed(NamedTuple):
    """Partners whose inputs were mixed in (MixUp). labels: name → int32 [B K]; share: float32 [B K], sum below 1."""

    labels: dict
    share: Float


class Batch(NamedTuple):
    """One global batch, as the loader gives it and the device receives it.

    inputs: modality → array: video uint8 [B T H W C], audio float32 [B S] at 16 kHz in
        [-1, 1], text int32 [B L], padded with the tokenizer's padding id.
    present: modality → bool [B], False where the sample has no such stream.
    labels: name → int32 [B], -1 where unknown; of tags, of which a clip has any number: int32 [B Y] of 1 and 0, -1 unknown.
    index: int32 [B], the sample's place in the order of the run: a pure function of
        (seed, step), and the seed of everything random about the sample.
    valid: bool [B], False for rows that only fill up an evaluation's last batch.
    mixed: what was mixed into the inputs, None: nothing.
    targets: name → arrays [B …] of what else is asked for: numbers, events, texts (data/targets.py).
    """

    inputs: dict
    present: dict
    labels: dict
    index: Int
    valid: Bool
    mixed: Mixed | None = None
    targets: dict = {}


class Patches(NamedTuple):
    """One modality cut into tokens before any parameter has seen it.

    values: [B N P] (uint8 pixels or float32 spectrogram) or token ids int32 [B N].
    valid: bool [B N], False for padding and for a stream that the sample lacks.
    grid: the token grid, static: (t, h, w), (f, m) or (L,); its product is N.
    classes: size of the vocabulary when values are ids, else 0.

    Several clips packed into each row (layers.packing) have more to say, else None; their grid bounds all of theirs:
    segment: int32 [B N], which of the row's clips a token is of, −1: padding.
    places: int32 [B N n], the token's place in its own clip's grid of n axes.
    extents: int32 [B S n], the grid of each of the row's S clips, 0 where it has fewer.
    """

    values: Shaped
    valid: Bool
    grid: tuple
    classes: int
    segment: Int | None = None
    places: Int | None = None
    extents: Int | None = None


class Mask(NamedTuple):
    """Which tokens a view shows. keep: int32 [B K]; hidden: int32 [B N-K]; disjoint, together all."""

    keep: Int
    hidden: Int


class Tokens(NamedTuple):
    """One stream. x: [B N D]; valid: bool [B N]; at: int32 [B N], the place in the full grid."""

    x: Float
    valid: Bool
    at: Int


Streams = dict[str, Tokens]


class Outputs(NamedTuple):
    """What one view of the trunk gives to the objectives that read it.

    encoded: the streams after their encoders. fused: the same streams after fusion.
    patches: what the encoders were given, whole. masks: modality → Mask, for hidden streams only.
    layers: modality → [B N D] of each block of its encoder, first to last; a teacher's views only.
    target: what a teacher saw of the same batch, for an objective that names a `target`; where the view swaps a stream,
        the view as it was before.
    swapped: bool [B], which samples have a stream of another one; None: the view swaps nothing.
    clean: modality → Patches as they were before the view's noise, for the streams that have any.
    """

    encoded: Streams
    fused: Streams
    patches: dict
    masks: dict
    layers: dict | None = None
    target: "Outputs | None" = None
    swapped: Bool | None = None
    clean: dict = {}
