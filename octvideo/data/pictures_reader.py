"""Reading a folder of frames, with Pillow."""

import io
import itertools

import av
import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from octvideo.data.reader import ROUNDING_SECONDS, Image, Orientation, Reader, Times, decode_errors
from octvideo.data.source import Pictures


class PicturesReader(Reader):
    """Each picture is shown for as long as the others."""

    def __init__(self, media: Pictures) -> None:
        super().__init__(media)
        self._pictures, self.fps, self.frames_decoded = media, media.fps, 0
        self.duration_seconds = len(media.files) / media.fps

    def read(self, times: Times, short_side: int | None) -> list[Image]:
        shown = np.floor((times + ROUNDING_SECONDS) * self.fps).astype(int).clip(0, len(self._pictures.files) - 1)
        images: list[Image] = []
        for number, group in itertools.groupby(shown.tolist()):
            images += [self._read(number, short_side)] * len(list(group))
        return images

    def _read(self, number: int, short_side: int | None) -> Image:
        name = f"{self.path}/{self._pictures.files[number]}"
        with decode_errors(name, OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
            picture = ImageOps.exif_transpose(Pillow.open(io.BytesIO(self._pictures.picture(number))))
            rgb = np.asarray(picture.convert("RGB"))
        self.frames_decoded = (self.frames_decoded or 0) + 1
        if self._size(rgb.shape[1], rgb.shape[0], 1.0, short_side) == (rgb.shape[1], rgb.shape[0]):
            return rgb
        return self._image(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24"), short_side, (Orientation(), 1.0)
        )
