"""Opening a medium safely, and choosing which of its streams are decoded.

Files are untrusted: they are opened as file objects, so that no name is taken for a URL or a playlist, and only
regular files are: a pipe would block for ever.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import av

# Containers of media proper: no playlists (hls, concat, dash), no devices, no image lists.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,asf,ogg,wav,w64,mp3,flac,"
    "aac,ac3,eac3,aiff,caf,amr,amrnb,amrwb,h264,hevc,m4v,av1,obu,ivf,gif,apng,rm,nut,mxf,dv,vc1,aa,tta,ape,wv"
)
# Bare streams: they tell no length (what FFmpeg gives is a guess from the bit rate), and tags may trail.
BARE = (
    "mp3",
    "aac",
    "ac3",
    "eac3",
    "amr",
    "amrnb",
    "amrwb",
    "h264",
    "hevc",
    "m4v",
    "mpegvideo",
    "obu",
    "dts",
    "truehd",
)
# A title in another encoding is no reason to lose the clip; PyAV 19 takes it as it is.
_TITLES = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Streams that are not what a viewer sees or hears by default: a cover, a row of thumbnails, a commentary.
_Kind = av.stream.Disposition
_ASIDE = {
    "video": _Kind.attached_pic | _Kind.timed_thumbnails,
    "audio": _Kind.comment | _Kind.visual_impaired | _Kind.hearing_impaired | _Kind.karaoke | _Kind.clean_effects
    | _Kind.descriptions,
}  # fmt: skip


class Medium:
    """An open file: its container, and the streams of it that are decoded. A context manager.

    Attributes:
      container: of PyAV.
      file: the file object that the container reads.
      fresh: nothing was read or sought since it was opened, so that decoding begins at the beginning.

    Entering raises one of BROKEN.
    """

    def __init__(self, source: str | Path | BinaryIO, tracks: Mapping[str, int] = {}):
        """source: a path, or an open binary file, which is left open. tracks: "video" or "audio" → which stream of its
        kind, from 0; default: see `choose`."""
        self.source, self.tracks = source, tracks
        self.ended, self._chosen = {}, {}

    def __enter__(self) -> "Medium":
        self.file = open_regular(self.source) if isinstance(self.source, (str, Path)) else self.source
        try:
            self.begin = self.file.tell()
            self._open()
        except BaseException:
            self._close_file()
            raise
        return self

    def __exit__(self, *_):
        self.container.close()
        self._close_file()

    def _open(self) -> None:
        self.container = av.open(
            self.file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"}, **_TITLES
        )
        self.fresh = True

    def _close_file(self):
        if self.file is not self.source:
            self.file.close()

    def rewind(self) -> None:
        """Goes back to the beginning, by opening the file again: a seek may fail, land late, or lose a palette."""
        if not self.fresh:
            self.container.close()
            self.file.seek(self.begin)
            self._open()

    @property
    def format(self) -> str:
        """The first name of the container's format."""
        return self.container.format.name.split(",")[0]

    @property
    def timed(self) -> bool:
        """Whether the timestamps of sound tell where it is; else they are counted, or guesses from the bit rate."""
        return self.format not in ("avi", *BARE)

    @property
    def origin(self) -> float:
        """The container's first timestamp in seconds, from which time runs."""
        start = self.container.start_time
        return start / av.time_base if start is not None else 0.0

    def stream(self, kind: str):
        """Returns the stream of "video" or "audio" that is decoded, None where there is none."""
        if kind not in self._chosen:
            stream = choose(self.container, kind, self.tracks.get(kind))
            self._chosen[kind] = None if stream is None else stream.index
        index = self._chosen[kind]
        return None if index is None or index >= len(self.container.streams) else self.container.streams[index]

    def begins(self, kind: str) -> float:
        """Returns when the stream says that it begins, in seconds; 0 where it does not."""
        stream = self.stream(kind)
        return 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base) - self.origin

    def note_tracks(self, remarks: Counter) -> None:
        """Counts streams that were left aside for another one of their kind."""
        for kind in ("video", "audio"):
            if kind not in self.tracks and len(_candidates(self.container, kind)) > 1:
                remarks["track chosen"] = 1


def choose(container, kind: str, number: int | None = None):
    """Returns the stream of "video" or "audio" that a viewer gets, None where there is none.

    The one marked as default, else the first; never a cover picture, and no thumbnails, commentary or sound for the
    impaired where there is another. number: which stream of its kind, from 0.
    """
    if number is not None:
        streams = list(getattr(container.streams, kind))
        return streams[number] if 0 <= number < len(streams) else None
    streams = _candidates(container, kind)
    known = [stream for stream in streams if stream.codec_context is not None] or streams
    marked = [stream for stream in known if stream.disposition & _Kind.default] or known
    return next(iter(marked), None)


def _candidates(container, kind: str) -> list:
    streams = list(getattr(container.streams, kind))
    if kind == "video":
        streams = [stream for stream in streams if not stream.disposition & _Kind.attached_pic]
        # A picture beside moving ones is a thumbnail.
        streams = [stream for stream in streams if stream.frames != 1] or streams
    return [stream for stream in streams if not stream.disposition & _ASIDE[kind]] or streams


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading; raises OSError: it is not there, or a folder, pipe, socket or device."""
    # Without O_NONBLOCK, a pipe blocks here until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise PermissionError(errno.EACCES, "a pipe, socket or device, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
