"""Does what a card's example says where nothing of the caller's is: `python -I`, no network. See check.py."""

import json
import sys
from pathlib import Path


def _offline(event: str, arguments: tuple) -> None:
    # Addresses of the internet are tuples; those of sockets on this machine are strings.
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        raise RuntimeError("the example asks the network")


def main(asked: str, out: str) -> None:
    """Embeds in the current folder what a file asks for, and writes modality → [n E] as safetensors.

    asked: JSON of an example.Asked: {"base": …, "given": modality → text or the name of the folder's clip}.
    """
    sys.addaudithook(_offline)
    import numpy as np
    from safetensors.numpy import save_file

    import vmm

    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    found = vmm.load(".", told["base"]).embed(**told["given"])
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, out)
