"""Lightning's loggers, for runs that must not end because a log cannot be written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

log = logging.getLogger(__name__)


class _Patient:
    """Of loggers: the disk is full or gone: the first error is a warning, and what cannot be written is left out."""

    _warned = False

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The next call opens new files: TensorBoard's writer has ended with the error.
            self._experiment = None
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
    """A CSVLogger that warns where it cannot write, and lets training go on."""
