"""Predictions of live video: the classes of its newest clip, step after step."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from octvideo.data.live import Live, See, Shown
from octvideo.data.reader import READING_ERRORS, Orientation, one_line
from octvideo.errors import UserError
from octvideo.evaluation.drawing import Annotated
from octvideo.evaluation.prediction import Model, Predictor, Ranked, ranked
from octvideo.files import appearing

TIME_BASE = Fraction(1, 90_000)  # of segments


@dataclass(frozen=True, eq=False)
class Step:
    """The prediction of one clip of a stream, and what has come of the stream until then."""

    time: datetime  # when it was made, in UTC
    seconds: float  # when the clip's newest frame is shown, from the first frame of the stream
    stamp_seconds: float | None  # the same by the source's own clock, where it has one
    times_seconds: NDArray[np.float64]  # (T,) of the clip's frames, in the middle of each
    scores: NDArray[np.float32]  # (num_classes,) probabilities
    labels: Sequence[str]
    latency_seconds: float  # from the arrival of the newest frame to these scores
    received: int  # frames, since the start
    dropped: int  # of these; see `Live`
    reconnects: int
    alpha: float | None = None  # of the network, if a budget chose it, and the time that it took
    network_seconds: float | None = None

    def top(self, k: int = 5) -> list[Ranked]:
        """The k most likely classes, or all if there are fewer; most likely first. UserError for k below 1."""
        return ranked(self.scores, self.labels, k)


class Stream:
    """Predicts live video: iterating gives a `Step` for each clip, the newest that there is, until the stream ends.

        for step in Stream("rtsp://camera/1", "best.ckpt"):
            print(step.seconds, step.top(1))

    A network that takes longer than every_seconds is given the newest clip when it is done. Frames never wait for it.

    Args:
        source: a camera's number, an address, "-" or a file; see `Live`, also for reconnect_seconds, silence_seconds
            and see.
        model: a checkpoint or network as `Predictor` takes it, or a Predictor, whose clips and crops do not count: one
            clip in its centre is scored.
        every_seconds: from one clip's end to the next one's.

    Raises UserError for a source that cannot be one or a network that does not fit; iterating raises DecodeError if the
    source cannot be read, or was lost for too long.
    """

    def __init__(
        self,
        source: str,
        model: Predictor | Model,
        *,
        every_seconds: float = 1.0,
        reconnect_seconds: float = 300.0,
        silence_seconds: float = 5.0,
        see: See | None = None,
    ) -> None:
        if every_seconds <= 0:
            raise UserError(f"every_seconds must be positive, got {every_seconds}")
        self._predictor = model if isinstance(model, Predictor) else Predictor(model)
        self._every_seconds, how = every_seconds, self._predictor.trained.preprocessing
        limits = {"reconnect_seconds": reconnect_seconds, "silence_seconds": silence_seconds}
        self.live = Live(source, how, see=see, **limits)
        self._predictor.scores(np.zeros((1, *how.clip_size), np.uint8))  # the first takes longer

    def __iter__(self) -> Iterator[Step]:
        live, predictor = self.live, self._predictor
        with contextlib.closing(live):
            live.start()
            while (window := live.window(self._every_seconds)) is not None:
                alpha = None if predictor.budget is None else predictor.budget.alpha
                scores = predictor.scores(window.clip[None])[0].numpy()
                latency, labels = time.monotonic() - window.arrival, predictor.trained.labels
                labels = labels or [f"class {number}" for number in range(len(scores))]
                counts = live.received, live.dropped, live.reconnects
                clip = window.seconds, window.stamp_seconds, window.times_seconds, scores, labels
                taken = None if predictor.budget is None else predictor.budget.last_seconds
                yield Step(datetime.now(UTC), *clip, latency, *counts, alpha, taken)

    def stop(self) -> None:
        """Ends the iteration at its next step; signal handlers and other threads may call it."""
        self.live.stop()


class Segments:
    """Writes a stream, with the class that it had last, as mp4 files of some seconds each; see `Annotated`.

    A file is named by the time of its first frame, in UTC, and appears when it is complete: after `seconds`, or where
    the frames change their size. Give `see` to a `Stream`. Raises OSError if a file cannot be written.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds, self.files = folder, seconds, list[Path]()
        self.label, self.probability = "", 0.0  # to draw
        self._file, self._lock, self._closed = contextlib.ExitStack(), threading.Lock(), False
        self._target: Annotated | None = None
        self._begun, self._form = 0.0, (0, 0, (Orientation(), 1.0))
        folder.mkdir(parents=True, exist_ok=True)

    def see(self, seconds: float, frame: av.VideoFrame, shown: Shown) -> None:
        """Adds a frame; does nothing once closed."""
        with self._lock, self._errors():
            if self._closed:
                return
            form = frame.width, frame.height, shown
            if self._target is None or form != self._form or seconds - self._begun >= self.seconds:
                self._file.close()
                now = datetime.now(UTC).isoformat("T", "milliseconds").replace("+00:00", "Z")
                path = self.folder / f"{re.sub('[-:]', '', now)}.mp4"
                partial = self._file.enter_context(appearing(path))
                self._target = self._file.enter_context(Annotated(partial, Fraction(30), TIME_BASE))
                self._begun, self._form = seconds, form
                self.files.append(path)
            self._target.write(seconds - self._begun, frame, shown, self.label, self.probability)

    def close(self) -> None:
        """Completes the last file."""
        with self._lock, self._errors():
            self._closed = True
            self._file.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except READING_ERRORS as error:
            failure = OSError(error.errno, one_line(error), str(self.folder))
            self._closed = True
            with contextlib.suppress(*READING_ERRORS):
                self._file.__exit__(OSError, failure, None)  # removes the file that is not complete
            raise failure from error
