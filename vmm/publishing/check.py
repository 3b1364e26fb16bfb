"""vmm publish --check: a published folder loads in a clean process and gives what it gave when it was published."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import vmm
from vmm.errors import UserError, one_of
from vmm.publishing.example import BASE, Asked, absolute, asked_of, read_record, sha256
from vmm.source import told_base
from vmm.weights.published import read_config

# Of the largest value of each stream's embedding. Both sides are computed on a CPU in float32: other machines differ by
# 1e-6, other versions of the codecs by the last bit of a pixel.
TOLERANCE = 1e-3
_PATIENCE = 1800.0  # seconds
# Isolated: no current folder, no PYTHON… variables, no user's packages; of ours, this very package.
_BEGIN = "import sys; sys.path.insert(0, sys.argv[1]); from vmm.publishing.child import main; main(*sys.argv[2:])"


def check(folder: str | Path, base: str | Mapping[str, str] | None = None) -> dict[str, float]:
    """Does what the example of a folder's own card says, in a clean process, and compares. No code of the card is run.

    Files are compared by their SHA-256 first: a changed tensor is told even where the example does not use it.

    Args:
      base: of a folder of adapters, as of vmm.load; None: what the card names, else where it was in training.

    Returns:
      Modality → the largest difference of its embedding, as a share of its largest value.

    Raises:
      UserError: the folder is not whole, a file has changed, the example fails, or gives something else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that `vmm publish` wrote")
    expected, digests = read_record(folder)
    for name in digests:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing")
    for name, digest in digests.items():
        there = sha256(folder / name)
        if there != digest:
            raise UserError(
                f"{folder / name}: changed since it was published (SHA-256 {there[:12]}, then {digest[:12]})"
            )
    card = folder / "README.md"
    if not card.is_file():
        raise UserError(f"{folder}: README.md is missing")
    text = card.read_text(encoding="utf-8")
    if base is None and f'base="{BASE}"' in text:
        base = told_base(read_config(folder).get("base"), folder)
    asked = asked_of(text, absolute(base), card)
    if base is None and asked.base is not None:  # the card is a stranger's as the config is
        asked = asked._replace(base=absolute(told_base(asked.base, folder)))
    found = embed_as(folder, asked)
    if set(found) != set(expected):
        raise UserError(f"{card}: its example gives {sorted(found)}, at publishing it gave {sorted(expected)}")
    differences = {}
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise UserError(f"{card}: its example gives {name} {found[name].shape}, at publishing {value.shape}")
        difference = np.abs(found[name].astype(np.float64) - value).max() / max(np.abs(value).max(), 1e-12)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{card}: its example gives another {name} embedding than at publishing: they differ by "
                f"{difference:.2g} of the largest value, allowed are {TOLERANCE:g}"
            )
        differences[name] = float(difference)
    return differences


def embed_as(folder: Path, asked: Asked) -> dict[str, np.ndarray]:
    """Returns what a card's example gives, in a clean process on a CPU; raises UserError: it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # On the CPU: a TPU has room for one process alone, and numbers are to be the same anywhere.
    kept |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as work:
        file, out = Path(work) / "asked.json", Path(work) / "out.safetensors"
        file.write_text(json.dumps(asked._asdict()), encoding="utf-8")
        words = [sys.executable, "-I", "-c", _BEGIN, str(Path(vmm.__file__).parent.parent), str(file), str(out)]
        try:
            done = subprocess.run(words, cwd=folder, env=kept, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            raise UserError(f"{folder / 'README.md'}: its example does not end within {_PATIENCE:.0f} s") from None
        if done.returncode:
            line = ([line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"{folder / 'README.md'}: its example fails ({line.strip()})")
        return load_file(str(out))


def parse_base(words: Sequence[str] | None) -> str | dict[str, str] | None:
    """Returns a base from its words: one source, or MODALITY=SOURCE words; raises UserError: a mixture of both."""
    if not words:
        return None
    if len(words) == 1 and words[0].partition("=")[0] not in ("video", "audio", "text"):
        return words[0]
    pairs = [word.partition("=")[::2] for word in words]
    if not all(name in ("video", "audio", "text") and source for name, source in pairs):
        raise UserError(f"--base: one source, or MODALITY=SOURCE words; {one_of('', ('video', 'audio', 'text'))}")
    return dict(pairs)
