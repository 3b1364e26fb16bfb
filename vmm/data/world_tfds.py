"""The synthetic world as a TensorFlow Dataset: import this module, then `tfds.data_source("vmm_world")`.

    import tensorflow_datasets as tfds
    import vmm.data.world_tfds

    source = tfds.data_source("vmm_world/small", split="train", data_dir="data")
    grain.MapDataset.source(source)…

No TensorFlow is needed: files are ArrayRecord. `media` holds the bytes of an mp4, which vmm.data.media decodes.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from vmm.data import world


@dataclasses.dataclass(kw_only=True)
class WorldConfig(tfds.core.BuilderConfig):
    """Sizes: split → clips."""

    sizes: dict = dataclasses.field(default_factory=dict)


class VmmWorld(tfds.core.GeneratorBasedBuilder):
    """Two-second clips of moving shapes with sounds; what is seen and heard is known by construction."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        WorldConfig(name="full", description="the demo's", sizes={"train": 4608, "validation": 576, "test": 288}),
        WorldConfig(name="small", description="for a look", sizes={"train": 48, "validation": 12, "test": 18}),
    ]

    def __init__(self, *, file_format: str = "array_record", **settings):
        """As every TFDS builder; the files are ArrayRecord unless told otherwise."""
        super().__init__(file_format=file_format, **settings)

    def _info(self) -> tfds.core.DatasetInfo:
        names = {
            **{name: list(values) for name, values in world.FACTS.items()},
            **{bit: ["no", "yes"] for bit in world.BITS},
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Two-second clips of moving shapes with sounds, whose labels are known by construction.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "media": tfds.features.Scalar(np.object_),
                    "caption": tfds.features.Sequence(tfds.features.Text()),
                    # A clip without sound has no label of what is heard: -1.
                    **{name: tfds.features.ClassLabel(names=classes) for name, classes in names.items()},
                }
            ),
        )

    def _split_generators(self, _) -> dict:
        # All splits are drawn together, so that none shares a combination; the files go with the last reader.
        scratch = tempfile.TemporaryDirectory()
        world.generate(scratch.name, self.builder_config.sizes)
        return {split: self._generate_examples(scratch, split) for split in self.builder_config.sizes}

    def _generate_examples(self, scratch: tempfile.TemporaryDirectory, split: str) -> Iterator[tuple[str, dict]]:
        """Yields (id, example) of a split."""
        folder = Path(scratch.name)
        for line in (folder / f"{split}.jsonl").read_text().splitlines():
            clip = json.loads(line)
            labels = {name: clip["labels"].get(name, -1) for name in (*world.FACTS, *world.BITS)}
            media = (folder / clip["path"]).read_bytes()
            yield clip["id"], {"id": clip["id"], "media": media, "caption": clip["caption"] or [], **labels}
