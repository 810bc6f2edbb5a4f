"""What runs record of how they were started, and the list of them."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import run_tool, small

from octvideo.commands import runs
from octvideo.data.lists import VideoList
from octvideo.training import record


def made_run(folder, alpha=0.25, top1=0.5, **model):
    """A run's folder, as far as the list reads it."""
    folder.mkdir(parents=True)
    config = {"model": {"name": "i3d_r50", "alpha": alpha, **model}, "trainer": {"max_epochs": 3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "csv" / "version_0").mkdir(parents=True)
    rows = "".join(f"{epoch},{step},{top1 - 0.1 * (2 - epoch)}\n" for epoch, step in enumerate((9, 19, 29)))
    (folder / "csv" / "version_0" / "metrics.csv").write_text("epoch,step,val/top1\n" + rows)
    return folder


def test_a_start_has_the_commit_the_versions_and_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.git_state(tmp_path) is None
    for words in (["init", "-q"], ["add", "file"], ["-c", "user.name=x", "-c", "user.email=y", "commit", "-qm", "z"]):
        (tmp_path / "file").write_text("1")
        subprocess.run(["git", *words], check=True)
    clean = record.git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["changed"] == []
    (tmp_path / "file").write_text("2")
    assert record.git_state(tmp_path) == {"commit": clean["commit"], "changed": ["file"]}
    start = record.describe({"train_list": VideoList(["/data/a.mp4"], np.array([1]))}, "/data")
    assert start["versions"]["octvideo"]
    assert start["command"] == sys.argv
    assert start["data"]["train_list"]["videos"] == 1


def test_lists_are_told_apart_by_paths_and_labels_but_not_by_where_they_are():
    paths, labels = ["/data/a.mp4", "/data/b.mp4"], np.array([0, 1])
    one = record.fingerprint(VideoList(paths, labels), "/data")
    assert record.fingerprint(VideoList(["/other/a.mp4", "/other/b.mp4"], labels), "/other/") == one
    assert record.fingerprint(VideoList(paths[::-1], labels), "/data") != one
    assert record.fingerprint(VideoList(paths, labels[::-1]), "/data") != one
    shares = record.fingerprint(VideoList(paths, np.array([[0.5, 0.5], [0, 1]], np.float32)), None)
    assert shares["videos"] == 2


def test_a_start_is_added_and_a_broken_file_is_none(tmp_path):
    assert record.read(tmp_path) == []
    for number in (1, 2):
        record.append(tmp_path, {"started": number})
    assert record.read(tmp_path) == [{"started": 1}, {"started": 2}]
    (tmp_path / record.FILE).write_text("{")
    assert record.read(tmp_path) == []


def test_an_error_is_added_to_its_start(tmp_path):
    record.append(tmp_path, {"started": 1})
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True)
    record.RunRecord().on_exception(trainer, None, KeyboardInterrupt())
    assert record.read(tmp_path) == [{"started": 1}]
    record.RunRecord().on_exception(trainer, None, ValueError("too few"))
    assert record.read(tmp_path) == [{"started": 1, "error": "ValueError: too few"}]


def test_the_list_has_a_row_for_each_run(tmp_path, capsys):
    made_run(tmp_path / "b", alpha=0, downsample="pool")
    tested = made_run(tmp_path / "deep" / "a", top1=0.9)
    (tested / "test").mkdir()
    (tested / "test" / "predictions.json").write_text('{"top1": 0.875}')
    start = {"started": "2026-01-02T03:04:05+0000", "git": {"commit": "c0ffee" * 6, "changed": ["x"]}}
    record.append(tested, start | {"data": {"train_list": {"sha256": "abcdef0123456"}}})
    record.append(tested, start)
    own = made_run(tmp_path / "c", network={"class_path": "my.Net"})
    record.append(own, start | {"error": "ListError: too few"})
    (own / "csv" / "version_0" / "metrics.csv").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("model: 3")
    assert runs.main([str(tmp_path), f"--json={tmp_path / 'rows.json'}", "--sort=val"]) == 0
    out, err = capsys.readouterr()
    assert "broken is left out" in err
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["run"] for row in rows] == ["c", "b", "deep/a"]  # the one without a validation first
    assert [row["val"] for row in rows] == [None, 0.5, 0.9]
    assert [row["network"] for row in rows] == ["my.Net", "i3d_r50", "i3d_r50"]
    assert (rows[2]["test"], rows[2]["epochs"], rows[2]["resumed"]) == (0.875, 3, 1)
    for text in ("failed", "0, pool", "3 of 3", "87.5", "2026-01-02 03:04, resumed 1", "c0ffeec0+", "abcdef01"):
        assert text in out


@pytest.mark.parametrize(("words", "message"), [(["none"], "none: no such folder"), (["."], "no run in .")])
def test_where_there_is_no_run_it_says_so(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runs.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_training_records_its_start(trained, motions):
    (start,) = record.read(trained)
    lines = (motions / "train.csv").read_text().splitlines()
    assert start["data"]["train_list"]["videos"] == len(lines) == 32
    assert start["data"]["val_list"]["videos"] == 16
    assert any("train_net.py" in word for word in start["command"])
    assert set(start["versions"]) == {*record.PACKAGES, "python"}


@pytest.mark.long
@pytest.mark.slow
def test_mlflow_has_a_runs_options_and_metrics(motions, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'octvideo[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="pip install 'octvideo[mlflow]'")
    words = [*small(motions, tmp_path / "run"), "--trainer.max_epochs=1", "--loggers=[mlflow]"]
    finished = run_tool("train_net.py", *words)
    assert finished.returncode == 0, finished.stderr
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("octvideo").experiment_id])
    assert found.info.run_name == "run"
    assert found.info.status == "FINISHED"
    assert found.data.params["alpha"] == "0.25"
    assert "val/top1" in found.data.metrics
