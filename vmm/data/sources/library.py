"""The media that a user has of a published dataset: a folder listed once, searched by the stems of file names."""

import os
from collections.abc import Sequence
from pathlib import Path

from vmm.data.sources.entry import AUDIO, MEDIA, Entry
from vmm.errors import UserError


class Library:
    """All media files below a folder, through links too. Counts what was asked for and what was there.

    Raises:
      UserError: no such folder, or no media in it.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name the folder of the media with --media")
        self.folder, self.asked, self.found = folder, 0, 0
        self.files: dict[str, list[str]] = {}
        entered = set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            place = os.stat(parent)
            if (place.st_dev, place.st_ino) in entered:  # a link to a folder above would never end
                folders.clear()
                continue
            entered.add((place.st_dev, place.st_ino))
            folders.sort()
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in MEDIA and not name.startswith("._"):
                    self.files.setdefault(stem, []).append(os.path.join(parent, name))
        if not self.files:
            raise UserError(f"{folder}: holds no media files; name the folder of the media with --media")

    def find(self, stem: str, folder: str = "") -> str | None:
        """Returns a file by the stem of its name. Of several, one below a folder of the name `folder`, then one with
        pictures, then the least nested, then the first by name."""

        def worse(path: str) -> tuple:
            parents = Path(path).parent.parts
            beside = folder in parents or folder.replace(" ", "_") in parents
            return not beside, os.path.splitext(path)[1].lower() in AUDIO, len(parents), path

        found = self.files.get(stem, ())
        return found[0] if len(found) == 1 else min(found, key=worse, default=None)

    def place(self, entry: Entry, clips: Sequence[str], whole: Sequence[str] = (), folder: str = "") -> Entry:
        """Returns the entry with the path of its medium, or with the reason "missing".

        Args:
          clips: stems under which the clip itself may lie: it is taken from its beginning to its end.
          whole: stems under which the video may lie that it is cut from: the entry's span stays.
        """
        self.asked += 1
        for stem in (*clips, *whole):
            path = self.find(stem, folder)
            if path:
                self.found += 1
                return (
                    entry._replace(path=path) if stem not in clips else entry._replace(path=path, start=None, end=None)
                )
        stems = list(dict.fromkeys((*clips, *whole)))
        names = " or ".join(f"{stem}.*" for stem in stems)
        return entry._replace(
            path=str(self.folder / stems[0]), reason="missing", detail=f"no file {names} below {self.folder}"
        )
