"""Runs a card's example where nothing of the caller's is: `python -I`, no network. See check.py."""

import sys
from pathlib import Path


def _offline(event: str, arguments: tuple) -> None:
    # Addresses of the internet are tuples; those of sockets on this machine are strings.
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        raise RuntimeError("the example asks the network")


def main(code: str, out: str) -> None:
    """Runs the code in the current folder and writes its `embeddings`, modality → [n E], as safetensors."""
    sys.addaudithook(_offline)
    names: dict = {"__name__": "__main__"}
    exec(compile(Path(code).read_text(encoding="utf-8"), "README.md", "exec"), names)
    import numpy as np
    from safetensors.numpy import save_file

    if not isinstance(names.get("embeddings"), dict):
        raise RuntimeError("it leaves no `embeddings`, modality → array")
    save_file({name: np.ascontiguousarray(value) for name, value in names["embeddings"].items()}, out)
