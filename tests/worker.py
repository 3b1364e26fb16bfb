"""What a process of a job does in tests: trains as `vmm train` does, and writes down which samples it was given."""

import json
import sys
from pathlib import Path

from vmm.build import load_config
from vmm.data.loader import Loader
from vmm.errors import Preempted
from vmm.train import train
from vmm.training import distributed

_, CONFIG, WORKDIR, IDS = sys.argv


class Recorder(Loader):
    """A loader that appends the indices of every batch of this process to a file."""

    def __iter__(self):
        for batch in super().__iter__():
            with open(IDS.replace("PROCESS", str(self.host)), "a") as file:
                file.write(json.dumps(batch.index.tolist()) + "\n")
            yield batch

    def __init__(self, *args, **kwargs):
        self.host = kwargs["host"]
        super().__init__(*args, **kwargs)


if __name__ == "__main__":
    Path(IDS).parent.mkdir(parents=True, exist_ok=True)
    try:
        with distributed.joined():
            train(load_config(CONFIG), WORKDIR, loader=Recorder)
    except Preempted as stop:
        print(f"vmm: {stop}")
        sys.exit(stop.code)
