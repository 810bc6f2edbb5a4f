"""What a server of predictions runs behind its HTTP: decoding in several processes, one network for all requests."""

import collections
import contextlib
import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octvideo.data.preprocessing import Preprocessing
from octvideo.data.watchdog import HungError, Watchdog
from octvideo.errors import DecodeError, UserError
from octvideo.evaluation.prediction import Predictor, read_views
from octvideo.models.scoring import probabilities

Clips = NDArray[np.uint8]  # (N, C, T, H, W)


@dataclass(frozen=True)
class Served:
    """A network that gives scores."""

    score: Callable[[Clips], Tensor]  # probabilities (N, num_classes)
    labels: Sequence[str]
    preprocessing: Preprocessing
    about: dict[str, Any]  # for whoever asks what is served


def of_predictor(predictor: Predictor) -> Served:
    """The network of a checkpoint."""
    trained = predictor.trained
    about = {"network": trained.name, "alpha": trained.options["alpha"], "runtime": f"torch on {predictor.device}"}
    return Served(predictor.scores, trained.labels, trained.preprocessing, about)


def of_onnx(path: Path) -> Served:
    """A file of `octvideo export`, in onnxruntime on the CPU; UserError for another file, or without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("ONNX needs onnxruntime: python -m pip install 'octvideo[export]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
        recorded = {field.name: found[field.name] for field in fields(Preprocessing) if field.name in found}
        size = found["test_crop_size"]
        recorded |= {"crop_size": size, "short_side": (size, size)}  # of training, which it does not record
        labels, kind, task = found["labels"], found["output"], found["task"]
        how = Preprocessing.from_mapping(recorded)
    except Exception as error:  # those of onnxruntime have no class of their own
        raise UserError(f"{path}: not an ONNX file of octvideo export: {str(error).splitlines()[0]}") from error
    batch = session.get_inputs()[0].shape[0]  # a name where it is free

    def score(clips: Clips) -> Tensor:
        together = batch if isinstance(batch, int) else 16
        parts = []
        for start in range(0, len(clips), together):
            part = clips[start : start + together]
            missing = together - len(part) if isinstance(batch, int) else 0
            padded = np.concatenate([part, np.zeros_like(part, shape=(missing, *part.shape[1:]))])
            parts.append(torch.from_numpy(session.run(None, {"clips": padded})[0][: len(part)]))
        output = torch.cat(parts)
        return output if kind == "probabilities" else probabilities(output, task)

    name = (found.get("network") or {}).get("class_path") or found["name"]
    about = {"network": name, "alpha": found["alpha"], "runtime": "onnxruntime on cpu"}
    return Served(score, labels, how, about)


class Scored(NamedTuple):
    """Scores of one request's clips, and how many clips were scored together."""

    scores: Tensor
    together: int


class Batcher:
    """Runs a network in a thread of its own, on the clips of all requests that wait: `most` at a time, or of one.

    `score` gets clips of one shape (N, C, T, H, W). Where it fails, each request is tried by itself.
    """

    def __init__(self, score: Callable[[Clips], Tensor], most: int) -> None:
        self.score, self.most = score, most
        self._jobs: queue.SimpleQueue[tuple[Clips, Future[Scored]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    def submit(self, clips: Clips) -> "Future[Scored]":
        """The scores of a request's clips, when they are there."""
        future: Future[Scored] = Future()
        self._jobs.put((clips, future))
        return future

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answers what waits, then ends."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        waiting = collections.deque([self._jobs.get()])
        while waiting[0] is not None:
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._jobs.get_nowait())
            batch: list[tuple[Clips, Future[Scored]]] = []
            count = 0
            while waiting and waiting[0] is not None and (not batch or count + len(waiting[0][0]) <= self.most):
                batch.append(waiting.popleft())  # type: ignore[arg-type]
                count += len(batch[-1][0])
            self._answer([job for job in batch if job[1].set_running_or_notify_cancel()])
            if not waiting:
                waiting.append(self._jobs.get())

    def _answer(self, batch: Sequence[tuple[Clips, "Future[Scored]"]]) -> None:
        if not batch:
            return
        counts = [len(clips) for clips, _ in batch]
        try:
            scores = self.score(np.concatenate([clips for clips, _ in batch])).split(counts)
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for job in batch:
                    self._answer([job])
            return
        for part, (_, future) in zip(scores, batch, strict=True):
            future.set_result(Scored(part, sum(counts)))


class Decoding:
    """Reads the views of videos, as many at a time as there are processes, each killed where a decoder hangs.

    The processes start with it: it is made by a thread that lasts, before others start. Only PyAV decodes, which opens
    no files that an upload names.
    """

    def __init__(self, how: Preprocessing, num_clips: int, num_crops: int, processes: int, timeout: float) -> None:
        read = partial(read_views, how, "pyav", None, num_clips, num_crops)
        self._readers: queue.SimpleQueue[Watchdog[str, Any]] = queue.SimpleQueue()
        for _ in range(processes):
            reader = Watchdog(read, timeout)
            with contextlib.suppress(DecodeError):
                reader("")
            self._readers.put(reader)

    def __call__(self, path: str) -> Clips:
        """Views (num_clips * num_crops, C, T, H, W); DecodeError for what is no video, is broken, or takes too long."""
        reader = self._readers.get()
        try:
            clips: Clips = reader(path)[1]
            return clips
        except HungError as error:
            raise DecodeError(path, error.reason) from error
        finally:
            self._readers.put(reader)
