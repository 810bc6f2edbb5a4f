"""Logs that cannot be written do not end a run."""

from pathlib import Path

import pytest

from octvideo.training.loggers import PatientCSVLogger, PatientTensorBoardLogger

FULL = Path("/dev/full")  # Linux's file on which every write finds the disk full
THREAD = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@THREAD  # in which TensorBoard writes, and finds the disk full
def test_tensorboard_goes_on_after_a_full_disk(tmp_path, caplog):
    logger = PatientTensorBoardLogger(tmp_path, name="", version="")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    record_writer = logger.experiment.file_writer.event_writer._async_writer._writer
    record_writer._writer = FULL.open("wb", buffering=0)
    for step in range(1, 5):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()  # waits for the writer, and finds its error
    logger.finalize("success")
    warnings = [record.getMessage() for record in caplog.records if "cannot write" in record.getMessage()]
    assert warnings == [
        "PatientTensorBoardLogger cannot write: [Errno 28] No space left on device. Training goes on without it."
    ]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2  # the one from before, and the one after


def test_csv_goes_on_after_a_full_disk_and_loses_no_row(tmp_path, caplog):
    logger = PatientCSVLogger(tmp_path, name="csv")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    file = tmp_path / "csv" / "version_0" / "metrics.csv"
    file.with_name("metrics.csv.tmp").symlink_to(FULL)
    logger.log_metrics({"loss": 2.0, "top1": 0.5}, 1)  # a new column: all is written again
    logger.save()
    warnings = [record.getMessage() for record in caplog.records if "cannot write" in record.getMessage()]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert file.read_text().splitlines() == ["loss,step", "1.0,0"]
    logger.log_metrics({"loss": 3.0}, 2)
    logger.finalize("success")
    assert file.read_text().splitlines() == ["loss,step,top1", "1.0,0,", "2.0,1,0.5", "3.0,2,"]
    assert [path.name for path in file.parent.iterdir()] == ["metrics.csv"]


def test_csv_that_is_a_link_stays_one(tmp_path):
    logger = PatientCSVLogger(tmp_path, name="csv")
    file = Path(logger.experiment.metrics_file_path)
    file.symlink_to(tmp_path / "metrics.csv")
    for step in range(2):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()
    assert file.is_symlink()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["loss,step", "1.0,0", "1.0,1"]
