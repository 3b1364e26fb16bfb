"""A folder of media files; captions beside them, class folders around them."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vmm.data.sources.entry import MEDIA, Bad, Entry, captions_of
from vmm.errors import UserError

_BESIDE = (".txt", ".json")  # of captions


def folder(path: Path, label: str = "", links: bool = False) -> Iterator[Entry]:
    """Yields every media file below a folder, sorted by path. id: the path without its suffix.

    A caption is the text of a .txt file of the same name, or the "caption" of a .json one. label: name under which
    the first folder's name becomes a class (`archery/a1.mp4` → {label: "archery"}). links: whether links that lead out of
    the folder are followed. Files that are no clips, and no captions of one, are listed as not taken.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    files, outside = _files(path, links)
    names = [name for name in files if Path(name).suffix.lower() in MEDIA and not Path(name).name.startswith(".")]
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
    known = {*names, *(stem + suffix for stem in stems for suffix in _BESIDE)}
    for name in files:
        if name not in known:
            hidden = Path(name).name.startswith(".")
            detail = "a hidden file" if hidden else f"{Path(name).suffix or 'no suffix'}: not one of media"
            yield Entry(name, str(path / name), reason="not taken", detail=detail)
    for name in outside:
        yield Entry(
            name, str(path / name), reason="bad path", detail="a link that leads out of the folder; --links follows it"
        )


def _files(path: Path, links: bool) -> tuple[list[str], list[str]]:
    """Returns the files below a folder and the links that lead out of it, by name, sorted. A link to a folder that was
    entered already is not followed: it might never end."""
    root = os.path.realpath(path)
    files, outside, entered = [], [], {root}
    for here, folders, names in os.walk(path, followlinks=True):
        kept = []
        for name in sorted(folders):
            place = os.path.join(here, name)
            real = os.path.realpath(place)
            if os.path.islink(place) and not links and not _within(real, root):
                outside.append(os.path.relpath(place, path))
            elif not os.path.islink(place) or real not in entered:
                entered.add(real)
                kept.append(name)
        folders[:] = kept
        for name in names:
            place = os.path.join(here, name)
            leaves = os.path.islink(place) and not links and not _within(os.path.realpath(place), root)
            (outside if leaves else files).append(os.path.relpath(place, path))
    return sorted(files), sorted(outside)


def _within(real: str, root: str) -> bool:
    return real == root or real.startswith(root + os.sep)


def _caption(file: Path) -> tuple[str, ...]:
    text, data = file.with_suffix(".txt"), file.with_suffix(".json")
    try:
        if text.is_file():
            return captions_of(text.read_text(encoding="utf-8-sig"))
        if data.is_file():
            value = json.loads(data.read_text(encoding="utf-8-sig"))
            return captions_of(value.get("caption") if isinstance(value, dict) else None)
    except UnicodeDecodeError:
        raise Bad("bad caption", "not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Bad("bad caption", f"{data.name} is not JSON: {error}") from None
    except OSError as error:
        raise Bad("bad caption", f"cannot be read: {error.strerror}") from None
    return ()
