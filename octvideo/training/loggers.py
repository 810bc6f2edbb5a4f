"""Lightning's loggers, for runs that must not end because a log cannot be written."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from octvideo.files import replacing

log = logging.getLogger(__name__)


class _Patient:
    """Skips what cannot be written to a full or missing disk; the first error is a warning."""

    _warned = False

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(self, TensorBoardLogger):
                self._experiment = None  # its writer has ended with the error: the next call opens new files
            if not self._warned:
                log.warning("%s cannot write: %s. Training goes on without it.", type(self).__name__, error)
            self._warned = True

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._going_on():
            super().log_metrics(metrics, step)  # type: ignore[misc]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        with self._going_on():
            super().log_hyperparams(*args, **kwargs)  # type: ignore[misc]

    def save(self) -> None:
        with self._going_on():
            super().save()  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        with self._going_on():
            super().finalize(status)  # type: ignore[misc]


class PatientTensorBoardLogger(_Patient, TensorBoardLogger):  # type: ignore[misc]
    """A TensorBoardLogger that warns where it cannot write, and lets training go on."""


class PatientCSVLogger(_Patient, CSVLogger):  # type: ignore[misc]
    """Likewise a CSVLogger; its file changes as a whole or not at all, and rows that failed are tried again."""

    @rank_zero_only
    def save(self) -> None:
        with self._going_on():
            writer = self.experiment
            if not writer.metrics:
                return
            path, columns = Path(os.path.realpath(writer.metrics_file_path)), list(writer.metrics_keys)
            partial = path.with_name(path.name + ".tmp")
            try:
                with replacing(path, partial):
                    if path.is_file():
                        shutil.copyfile(path, partial)
                    writer.metrics_file_path = str(partial)  # which it truncates before it writes new columns
                    super(_Patient, self).save()
            except OSError:
                writer.metrics_keys = columns
                raise
            finally:
                writer.metrics_file_path = str(path)
