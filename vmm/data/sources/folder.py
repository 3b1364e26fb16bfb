"""A folder of media files; captions beside them, class folders around them."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vmm.data.sources.entry import MEDIA, Bad, Entry, captions_of
from vmm.errors import UserError


def folder(path: Path, label: str = "") -> Iterator[Entry]:
    """Yields every media file below a folder, sorted by path. id: the path without its suffix.

    A caption is the text of a .txt file of the same name, or the "caption" of a .json one. label: name under which
    the first folder's name becomes a class (`archery/a1.mp4` → {label: "archery"}).
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    names = sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.suffix.lower() in MEDIA and not file.is_dir()
    )
    if not names:
        raise UserError(f"{path}: holds no media files ({', '.join(sorted(MEDIA))})")
    stems = [name.rsplit(".", 1)[0] for name in names]
    twice = {stem for stem, count in Counter(stems).items() if count > 1}
    for name, stem in zip(names, stems):
        file = path / name
        entry = Entry(id=name if stem in twice else stem, path=str(file))
        if label and len(Path(name).parts) > 1:
            entry = entry._replace(labels={label: Path(name).parts[0]})
        try:
            yield entry._replace(captions=_caption(file))
        except Bad as error:
            yield entry._replace(reason=error.reason, detail=error.detail)


def _caption(file: Path) -> tuple[str, ...]:
    text, data = file.with_suffix(".txt"), file.with_suffix(".json")
    try:
        if text.is_file():
            return captions_of(text.read_text(encoding="utf-8"))
        if data.is_file():
            value = json.loads(data.read_text(encoding="utf-8"))
            return captions_of(value.get("caption") if isinstance(value, dict) else None)
    except UnicodeDecodeError:
        raise Bad("bad caption", "not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Bad("bad caption", f"{data.name} is not JSON: {error}") from None
    except OSError as error:
        raise Bad("bad caption", f"cannot be read: {error.strerror}") from None
    return ()
