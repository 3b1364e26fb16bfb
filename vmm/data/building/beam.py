"""vmm data build as an Apache Beam pipeline: shards are the elements, each worker builds whole ones.

An optional extra (`pip install "vmm[beam]"`, best in an environment of its own). The same code does the work, so the
dataset is the same, byte for byte. OUT must be a folder that every worker can write (NFS, Lustre, a mounted bucket).
"""

import functools
from collections.abc import Sequence

from vmm.errors import UserError


def spread_over_beam(out: str, runner: str, options: Sequence[str], shards: Sequence[int]) -> None:
    """Calls build_shard(out, shard) for every shard, in a pipeline.

    Args:
      runner: a Beam runner, as "DirectRunner", "FlinkRunner", "DataflowRunner". options: its flags, as "--region=…".

    Raises:
      UserError: Beam is not installed, or does not know the runner; what the pipeline itself raises.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f'--runner: {error}; pip install "vmm[beam]", best in an environment of its own') from None
    from vmm.data.building.build import build_shard

    if not shards:
        return
    try:
        pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={runner}", *options]))
    except ValueError as error:
        raise UserError(f"--runner {runner}: {str(error).splitlines()[0]}") from None
    with pipeline:
        # Reshuffle: without it the runner fuses all into one worker's work.
        shards = pipeline | "shards" >> beam.Create(list(shards)) | "spread" >> beam.Reshuffle()
        _ = shards | "build" >> beam.Map(functools.partial(build_shard, out))
