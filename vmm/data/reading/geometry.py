"""Which part of a stored frame is kept, and how it becomes an upright square: pixel shape, turns, odd sides."""

import math
from typing import NamedTuple

import av
import numpy as np

# Planar formats of which a part is cut without arithmetic: format → bytes a value; how many pixels share one value of each
# plane stands in the planes' own sizes. All others become RGB first.
_PLANAR = {
    "yuv420p": 1, "yuvj420p": 1, "yuv422p": 1, "yuvj422p": 1, "yuv444p": 1, "yuvj444p": 1, "yuv411p": 1, "yuv410p": 1,
    "yuv420p10le": 2, "yuv422p10le": 2, "yuv444p10le": 2, "yuv420p12le": 2, "yuv422p12le": 2, "gray": 1, "gbrp": 1,
}  # fmt: skip
_WIDEST = 16.0  # width of a pixel to its height, at most: more is a broken header


class Crop(NamedTuple):
    """Which part of a frame is kept, as it is shown: upright, with square pixels.

    y, x: its place, fractions of the free range. area: share of the picture, None: the largest square.
    aspect: width to height of a part with an area; it is squeezed into a square. flip: mirrored.
    share: without an area, of the shorter side that the square covers; 0: the whole picture, squeezed into a square.
    """

    y: float = 0.5
    x: float = 0.5
    area: float | None = None
    aspect: float = 1.0
    flip: bool = False
    share: float = 1.0

    def sides(self, height: float, width: float) -> tuple[float, float]:
        """Returns the height and width of the part, in the unit of the frame's; what does not fit is cut."""
        if self.area is None:
            side = self.share * min(height, width)
            return (side, side) if side else (height, width)
        root = math.sqrt(self.area * height * width)
        return min(height, root / math.sqrt(self.aspect)), min(width, root * math.sqrt(self.aspect))


def pixel_ratio(stream) -> float:
    """Returns the width of a pixel to its height, 1 where the stream does not tell it or tells nonsense."""
    ratio = float(stream.sample_aspect_ratio or 1)
    return ratio if 1 / _WIDEST <= ratio <= _WIDEST else 1.0


def shown_aspect(frame, ratio: float) -> float:
    """Returns the width to height of a frame as it is shown. ratio: of its pixels."""
    aspect = frame.width * ratio / frame.height
    return aspect if pose(frame)[0] % 2 == 0 else 1 / aspect


def picture(frame, size: int, crop: Crop, ratio: float = 1.0) -> np.ndarray:
    """Returns the part of a frame that is kept, upright, scaled to a square: uint8 [size size 3].

    ratio: width of a stored pixel to its height.
    """
    part = _part(frame, *_box(frame, crop, ratio))
    pixels = upright(frame, part.reformat(size, size, "rgb24", threads=1).to_ndarray())
    return np.ascontiguousarray(pixels[:, ::-1] if crop.flip else pixels)


def _box(frame, crop: Crop, ratio: float) -> tuple[float, float, float, float]:
    """Returns top, left, height, width of the part that is kept, in pixels of the stored frame."""
    turns, mirrored = pose(frame)
    height, width = float(frame.height), frame.width * ratio
    if turns % 2:
        height, width = width, height
    tall, wide = crop.sides(height, width)
    tall, wide, y, x = tall / height, wide / width, crop.y, crop.x
    # Back from the upright picture: the quarter turns to the left undone, then the mirror.
    for _ in range(turns):
        y, x, tall, wide = x, 1 - y, wide, tall
    if mirrored:
        y = 1 - y
    tall, wide = tall * frame.height, wide * frame.width
    return y * (frame.height - tall), x * (frame.width - wide), tall, wide


def _part(frame, top: float, left: float, height: float, width: float):
    """Returns the part of a frame, to the nearest pixel, and of colours that pixels share to the nearest of those: what is
    cut off need not be scaled."""
    top, height = _whole(top, height, frame.height)
    left, width = _whole(left, width, frame.width)
    if (height, width) == (frame.height, frame.width):
        return frame
    if frame.format.name not in _PLANAR:
        frame = frame.reformat(format="rgb24", threads=1)
        pixels = np.ascontiguousarray(frame.to_ndarray()[top : top + height, left : left + width])
        return av.VideoFrame.from_ndarray(pixels, "rgb24")
    part = av.VideoFrame(width, height, frame.format.name)
    value = np.uint8 if _PLANAR[frame.format.name] == 1 else np.uint16
    for source, target in zip(frame.planes, part.planes):
        down, across = (_shared(frame.height, source.height), _shared(frame.width, source.width))
        values = _values(source, value)
        rows, columns = target.height, target.width
        y, x = top // down, left // across
        _values(target, value)[:rows, :columns] = values[y : y + rows, x : x + columns]
    part.colorspace, part.color_range = frame.colorspace, frame.color_range
    return part


def _whole(begin: float, length: float, side: int) -> tuple[int, int]:
    """Returns (begin, length) along a side in whole pixels."""
    length = min(max(2, round(length)), side)
    return max(0, min(round(begin), side - length)), length


def _shared(pixels: int, values: int) -> int:
    """Returns how many pixels of a side share a value of a plane: 1, 2 or 4."""
    return min((1, 2, 4), key=lambda share: abs(-(-pixels // share) - values))


def _values(plane, kind) -> np.ndarray:
    """Returns a plane's values, padding included: [rows, line]."""
    values = np.frombuffer(plane, np.uint8)
    rows = len(values) // plane.line_size
    return values[: rows * plane.line_size].reshape(rows, plane.line_size).view(kind)


def pose(frame) -> tuple[int, bool]:
    """Returns (quarter turns to the left, whether it is mirrored top to bottom before them) of a stored frame."""
    turns = round(frame.rotation / 90) % 4
    mirrored = False
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        mirrored = a * d - b * c < 0
    return turns, mirrored


def upright(frame, pixels: np.ndarray) -> np.ndarray:
    """Returns pixels [H W C] of a frame as they are shown."""
    turns, mirrored = pose(frame)
    return np.rot90(pixels[::-1] if mirrored else pixels, turns)
