"""What is done with one video of a preparation, or one shard, in whatever process: pickled on the way there."""

import contextlib
import errno
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from octvideo import stores
from octvideo.data.lists import rooted
from octvideo.data.preparation.journal import Facts
from octvideo.data.preparation.reencode import measure, reencode
from octvideo.data.preparation.shards import Shard
from octvideo.data.source import AnySource, Media, Pictures
from octvideo.data.watchdog import still_alive
from octvideo.errors import DecodeError
from octvideo.files import BLOCK_BYTES, appearing, blocks

MEASURED = ("frames", "fps", "width", "height", "codec", "seconds")  # columns of the report, of the source file


@dataclass(frozen=True)
class Work:
    """Finds facts about videos.

    Args:
        videos: folder or URI that the sources' paths start from.
        output: folder or URI of the results.
        short_side: of re-encoded videos, in pixels; None: they stay as they are.
        frames_fps: frames a second of folders of frames.
    """

    videos: str
    output: str
    short_side: int | None = None
    frames_fps: float = 25.0

    @property
    def source(self) -> AnySource:
        return AnySource(self.frames_fps)

    def place(self, name: str) -> str:
        """The path or URI of a file that lists name."""
        root = self.videos if self.short_side is None else stores.child(self.output, "videos")
        return rooted(root, name)

    def fingerprint(self, path: str) -> Facts:
        """The hash of a source file's content."""
        digest = hashlib.sha256()
        for block in _blocks(self.source.find(rooted(self.videos, path))):
            digest.update(block)
            still_alive()
        return {"sha256": digest.hexdigest()}

    def check(self, path_and_name: tuple[str, str]) -> Facts:
        """Decodes a video to its end, and re-encodes it on the way, to be listed by that name."""
        path, name = path_and_name
        try:
            media = self.source.find(rooted(self.videos, path))
            if self.short_side is None:
                measured = written = measure(media)
                size = {}
            else:
                with _writing(self.place(name)) as file:
                    measured, written = reencode(media, file, self.short_side)
                    size = {"bytes": file.stat().st_size}
        except DecodeError as error:
            return {"status": "bad", "reason": error.reason}
        listed = {"path": name, **size, "keyframes": written.keyframe_seconds}
        listed |= {"frames": written.frames, "fps": written.fps, "seconds": written.seconds}
        numbers = {column: getattr(measured, column) for column in MEASURED}
        return {"status": "ok", "reason": measured.note, "measured": numbers, "listed": listed}

    def pack(self, shard: Shard) -> Facts:
        """Writes a shard."""

        def read(name: str) -> Iterator[bytes]:
            if isinstance(media := self.source.find(self.place(name)), Pictures):
                raise OSError(errno.EISDIR, f"{name} is a folder of frames: --reencode makes a file of it")
            return _blocks(media)

        with _writing(stores.child(self.output, shard.path)) as file, appearing(file) as partial:
            shard.write(partial, read)
        return {"digest": shard.digest}


@contextlib.contextmanager
def _writing(place: str) -> Iterator[Path]:
    """The local file to write for a path, or for a URI, where it is put at the end."""
    if not stores.is_uri(place):
        Path(place).unlink(missing_ok=True)  # room for the new one
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="octvideo") as folder:
        yield (file := Path(folder, os.path.basename(place)))
        stores.put(file, place)


def _blocks(media: Media) -> Iterator[bytes]:
    """The content of a video's file or files."""
    if isinstance(media, Pictures):
        yield from map(media.picture, range(len(media.files)))
    elif isinstance(opened := media.open(), str):
        yield from blocks(opened)
    else:
        with opened:
            yield from iter(functools.partial(opened.read, BLOCK_BYTES), b"")
