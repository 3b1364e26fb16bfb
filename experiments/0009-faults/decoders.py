"""Windows of files decoded by vmm, torchcodec and decord in turn: processor time a clip, in one process on one thread.

    pip install torch torchcodec decord
    python experiments/0009-faults/decoders.py FILE … [--rounds 12]

A window: 16 pictures over 2.13 s at a random place, the short side scaled to 224, the middle square; no sound.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from decord import DECORDError, VideoReader
from torchcodec.decoders import VideoDecoder

from vmm.data import media

FRAMES, SIZE, SECONDS = 16, 224, 64 / 30


def square(pictures: torch.Tensor) -> np.ndarray:
    """[T 3 H W] → uint8 [T 224 224 3]."""
    height, width = pictures.shape[2:]
    scale = SIZE / min(height, width)
    size = round(height * scale), round(width * scale)
    x = torch.nn.functional.interpolate(pictures.float(), size, mode="bilinear", antialias=True).round().byte()
    top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    return x[:, :, top : top + SIZE, left : left + SIZE].permute(0, 2, 3, 1).numpy()


def times(start: float) -> list[float]:
    return [start + (i + 0.5) * SECONDS / FRAMES for i in range(FRAMES)]


def by_vmm(path: Path, start: float) -> np.ndarray:
    return media.decode(
        path, pick=lambda _: start, seconds=SECONDS, frames=FRAMES, size=SIZE, sample_rate=16000, want=("video",)
    ).video  # fmt: skip


def by_torchcodec(path: Path, start: float) -> np.ndarray:
    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="approximate")
    return square(decoder.get_frames_played_at(times(start)).data)


def by_decord(path: Path, start: float) -> np.ndarray:
    reader = VideoReader(str(path), num_threads=1)
    rate = reader.get_avg_fps()
    picked = [min(len(reader) - 1, int(moment * rate)) for moment in times(start)]
    return square(torch.from_numpy(reader.get_batch(picked).asnumpy()).permute(0, 3, 1, 2))


WAYS = {"vmm": by_vmm, "torchcodec": by_torchcodec, "decord": by_decord}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| file | vmm ms | torchcodec / vmm | decord / vmm | mean difference of pixels |\n|---|---:|---:|---:|---:|")
    for path in given.files:
        ways = dict(WAYS)
        length, rng = media.probe_duration(path), np.random.default_rng(0)
        spent, apart = {name: [] for name in ways}, []
        for round_ in range(given.rounds + 1):
            start, found = float(rng.uniform(0, length - SECONDS)), {}
            for name, way in list(ways.items()):
                began = time.process_time()
                try:
                    found[name] = way(path, start)
                except DECORDError:  # its FFmpeg knows no AV1
                    spent.pop(name)
                    ways = {key: value for key, value in ways.items() if key != name}
                    continue
                if round_:  # the first warms up
                    spent[name].append(time.process_time() - began)
            apart.append(np.abs(found["vmm"].astype(int) - found["torchcodec"]).mean())
        ratio = {name: statistics.median(a / b for a, b in zip(spent[name], spent["vmm"])) for name in ways}
        beside = [f"{ratio[name]:.2f}" if name in ratio else "cannot" for name in ("torchcodec", "decord")]
        print(
            f"| {path.name} | {1000 * statistics.median(spent['vmm']):.0f} | {' | '.join(beside)} | "
            f"{statistics.median(apart):.1f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
