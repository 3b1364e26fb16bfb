"""A prepared TensorFlow Dataset whose files are ArrayRecord: read without TensorFlow."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vmm.data.sources.entry import Bad, Entry, captions_of, span_of
from vmm.errors import UserError, one_of


def tfds(path: Path, split: str = "train", columns: Mapping = {}, label: str = "") -> Iterator[Entry]:
    """Yields the examples of one split.

    Args:
      path: the version folder of the dataset (…/name/1.0.0), or one above with a single version.
      columns: field → feature; default: media, else the first bytes feature; caption, start, end, id.
      label: a feature that holds the class; ClassLabel indices become their names.
    """
    import tensorflow_datasets

    path = _version(path)
    try:
        builder = tensorflow_datasets.builder_from_directory(str(path))
        features = builder.info.features
        if split not in builder.info.splits:
            raise UserError(f"{path}: has no split {split!r}; {one_of(split, builder.info.splits)}")
        source = builder.as_data_source(split)
    except UserError:
        raise
    except Exception as error:  # TFDS raises many kinds
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: not a TFDS dataset in ArrayRecord files ({line}); prepare it with file_format='array_record'"
        ) from None
    media = columns.get("path") or next((name for name in ("media", "video", "audio", "mp4") if name in features), None)
    if media is None or media not in features:
        raise UserError(f"{path}: which feature holds the media's bytes? --column path=NAME; {one_of(media, features)}")
    if label and label not in features:
        raise UserError(f"{path}: has no feature {label!r}; {one_of(label, features)}")
    for number in range(len(source)):
        example = source[number]

        def get(field, example=example):
            value = example.get(columns.get(field, field))
            value = value.item() if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 else value
            return value.decode(errors="replace") if isinstance(value, bytes) else value

        identity = get("id")
        entry = Entry(
            str(identity) if identity not in (None, "") else f"{split}/{number:06d}",
            str(path), member=("tfds", split, number, media),
        )  # fmt: skip
        try:
            caption = get("caption")
            if isinstance(caption, (list, np.ndarray)):
                caption = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in caption]
            start, end = span_of(get("start"), get("end"))
            labels = {}
            if label:
                value = example[label]
                names = getattr(features[label], "names", None)
                labels = {label: names[int(value)] if names else _plain(value)}
            yield entry._replace(start=start, end=end, captions=captions_of(caption), labels=labels)
        except Bad as error:
            yield entry._replace(reason=error.reason, detail=error.detail)


def _plain(value):
    value = value.item() if hasattr(value, "item") else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _version(path: Path) -> Path:
    while path.is_dir() and not (path / "dataset_info.json").is_file():
        inside = [child for child in path.iterdir() if child.is_dir()]
        if len(inside) != 1:
            raise UserError(f"{path}: holds no dataset_info.json; give the version folder of a prepared TFDS dataset")
        path = inside[0]
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path
