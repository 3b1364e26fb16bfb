"""The files that a config names, looked for before anything that takes seconds is imported."""

from collections.abc import Mapping
from pathlib import Path

from vmm.build import make
from vmm.data import text
from vmm.data.remote import is_address
from vmm.data.samples import Data, reads_text
from vmm.errors import UserError


def check_files(config: Mapping) -> None:
    """Raises UserError where the data group is not one, or its training manifests or a tokenizer that is needed are not there."""
    if not isinstance(config.get("data"), Mapping):
        raise UserError("config.data: missing; give it a group of keys, as README's `A config` shows")
    data = make(Data, config["data"], "data")
    parts = [data.train] if isinstance(data.train, str) else list(data.train.values())
    for part in parts:
        path = part.get("manifest") if isinstance(part, Mapping) else part
        if isinstance(path, str) and not is_address(path) and not Path(path).is_file():
            raise UserError(
                f"dataset {path}: no such file; write a manifest (one JSON line per clip with a `path`), "
                "or make the synthetic world with `vmm data world`"
            )
    trunk = config.get("trunk")
    encoders = trunk.get("encoders") if isinstance(trunk, Mapping) else None
    if isinstance(encoders, Mapping) and reads_text(data, encoders):
        text.load_tokenizer(data.tokenizer)
