"""A prepared TensorFlow Dataset whose files are ArrayRecord: read without TensorFlow."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vmm.data.sources.entry import Bad, Entry, captions_of, labels_of, span_of
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
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: not a TFDS dataset in ArrayRecord files ({line}); prepare it with file_format='array_record'"
        ) from None
    media = columns.get("path") or next((name for name in ("media", "video", "audio", "mp4") if name in features), None)
    if media is None or media not in features:
        raise UserError(f"{path}: which feature holds the media's bytes? --column path=NAME; {one_of(media, features)}")
    for field, name in (*columns.items(), *([("the label", label)] if label else ())):
        if name not in features:
            raise UserError(f"{path}: has no feature {name!r} for {field}; {one_of(name, features)}")
    for number in range(len(source)):
        entry = Entry(f"{split}/{number:06d}", str(path), member=("tfds", split, number, media))
        try:
            example = source[number]
        except Exception as error:  # of a broken file; ArrayRecord and TFDS raise many kinds
            yield entry._replace(reason="bad line", detail=f"cannot be read: {str(error)[:200]}")
            continue
        yield _entry(entry, example, features, media, columns, label)


def _entry(entry: Entry, example: Mapping, features: Mapping, media: str, columns: Mapping, label: str) -> Entry:
    def get(field):
        return _plain(example.get(columns.get(field, field)))

    identity = get("id")
    entry = entry._replace(id=str(identity)) if identity not in (None, "") else entry
    try:
        if not isinstance(example[media], bytes):
            raise Bad("bad line", f"{media} is not bytes; store media as Scalar(np.object_)")
        start, end = span_of(get("start"), get("end"))
        labels = {}
        if label:
            feature = features[label]
            names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
            value = _plain(example[label])
            if names:
                # -1 is how TFDS writes that the class is not known.
                named = [names[item] for item in (value if isinstance(value, list) else [value]) if item >= 0]
                value = named if isinstance(value, list) else (named or [None])[0]
            labels = labels_of({label: value})
        return entry._replace(start=start, end=end, captions=captions_of(get("caption")), labels=labels)
    except Bad as error:
        return entry._replace(reason=error.reason, detail=error.detail)


def _plain(value):
    """Returns text, numbers and lists of them for what TFDS gives."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
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
