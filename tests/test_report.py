"""The HTML report: its figures, its sentences about missing parts, and the page in a browser."""

import csv
import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_tool
from torch.utils.tensorboard import SummaryWriter
from torchvision.io import decode_jpeg

from octvideo.commands import report as tool
from octvideo.data.motions import write_video
from octvideo.evaluation import report
from octvideo.evaluation.report import Curve, Run, bootstrap, measure, read_curves, read_run, render, wilson
from octvideo.models.checkpoint import load_trained
from octvideo.models.cost import count_macs, count_parameters
from octvideo.training.recognizer import Recognizer

NAMES = ["run", "<script>alert(1)</script>", "sit & wait"]
LABELS = [0, 0, 0, 1, 1, 2, 2, 2]
PREDICTED = [0, 1, 1, 1, 0, 2, 2, 0]
LOG = [
    {"step": 1, "train/loss_step": 2.0, "learning_rate": 0.1, "epoch": 0},
    {"step": 3, "train/loss_step": 1.5, "learning_rate": 0.05, "epoch": 0},
    {"step": 3, "train/loss_epoch": 1.8, "train/top1": 0.25, "train/clips_per_second": 40.0, "epoch": 0},
    {"step": 3, "val/loss": 1.6, "val/top1": 0.5, "epoch": 0},
]
ROWS = [
    {"alpha": alpha, "gmacs": 1 - alpha / 2, "statistics": statistics, "top1": 0.75, "top5": 1.0, "videos": 8, "bad": 0}
    for alpha in (0.0, 0.25, 0.5)
    for statistics in ("checkpoint", "re-estimated")
]


def some_videos(labels=LABELS, predicted=PREDICTED, classes=3):
    """Videos as in predictions.json; the later one, the surer its prediction."""
    videos = []
    for place, (label, guess) in enumerate(zip(labels, predicted, strict=True)):
        score = 0.5 + 0.4 * place / len(labels)
        scores = [score if number == guess else (1 - score) / (classes - 1) for number in range(classes)]
        videos.append({"path": f"videos/{place}.mp4", "label": label, "scores": scores})
    return videos


def write_results(folder, **others):
    """Writes a predictions.json; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"top1": 0.5, "top5": 1.0, "clip_top1": 0.45, "clip_top5": 0.9, "videos": some_videos(), "labels": NAMES}
    results |= {"bad": [{"path": "videos/torn.mp4", "reason": "End of file"}]} | others
    (folder / "predictions.json").write_text(json.dumps(results))
    return folder


def write_log(path, rows):
    """Writes a metrics.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))))
        writer.writeheader()
        writer.writerows(rows)


def write_events(folder, rows):
    """Writes TensorBoard's file."""
    with SummaryWriter(folder) as writer:
        writer.add_scalar("hp_metric", -1, 0)
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a tiny network."""
    torch.manual_seed(0)
    module = Recognizer("i3d_r50", alpha=0.25, num_classes=3, width=8)
    preprocessing = {"clip_frames": 4, "frame_stride": 2, "test_crop_size": 32}
    path = tmp_path_factory.mktemp("trained") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    content = {
        "hyper_parameters": dict(module.hparams),
        "VideoData": {"labels": NAMES, "preprocessing": preprocessing},
        "state_dict": module.state_dict(),
        "epoch": 4,
        "global_step": 1234,
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, path)
    return path


@pytest.fixture
def folder(tmp_path, checkpoint):
    """The folder of a run that has everything."""
    folder = tmp_path / "whole"
    write_results(folder / "test")
    (folder / "test" / "alphas.json").write_text(json.dumps(ROWS))
    write_log(folder / "csv" / "version_0" / "metrics.csv", LOG)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").symlink_to(checkpoint)
    return folder


def page(*runs, thumbnail=lambda path: "it is gone"):
    """The report of runs."""
    return render(runs, thumbnail, made="today", machine="this machine")


@pytest.mark.parametrize("outcomes", [[1] * 130 + [0] * 30, [1] * 9 + [0], [0.5] * 20 + [1.0] * 30 + [0.1] * 10])
def test_the_bootstrap_interval_is_that_of_resampled_videos(outcomes):
    outcomes = np.array(outcomes, np.float64)
    places = np.random.default_rng(1).integers(len(outcomes), size=(20_000, len(outcomes)))
    low, high = np.quantile(outcomes[places].mean(1), (0.025, 0.975))
    found = bootstrap(outcomes)
    assert found.mean == pytest.approx(outcomes.mean())
    assert found.interval == pytest.approx((low, high), abs=1 / len(outcomes))
    assert found.interval == bootstrap(outcomes[::-1]).interval


@pytest.mark.parametrize(("right", "number"), [(0, 10), (10, 10), (10, 20), (17, 20), (1, 1)])
def test_the_score_interval_ends_where_the_share_is_just_not_rejected(right, number):
    share, ends = wilson(right, number)
    assert share == right / number
    assert ends[0] - 1e-12 <= share <= ends[1] + 1e-12
    for end in ends:
        assert abs(share - end) == pytest.approx(1.959964 * np.sqrt(max(0, end * (1 - end)) / number), abs=1e-6)


def test_confusions_accuracies_and_mistakes_are_counted(tmp_path):
    predictions = read_run(write_results(tmp_path)).predictions
    assert predictions.confusion().tolist() == [[1, 2, 0], [1, 1, 0], [1, 0, 2]]
    found = predictions.accuracies()
    assert {key: accuracy.mean for key, accuracy in found.items()} == {
        **{"top1": 0.5, "top5": 1.0, "clip_top1": 0.45, "clip_top5": 0.9}
    }
    assert found["top1"] == bootstrap(np.array([1, 0, 0, 1, 0, 1, 1, 0], np.float64))
    assert found["clip_top1"].interval is None
    assert predictions.mistakes() == [7, 4, 2, 1]
    rows = report.class_rows(predictions)
    assert [(row["name"], row["videos"], row["accuracy"], row["confused"]) for row in rows] == [
        (NAMES[0], 3, wilson(1, 3), (NAMES[1], 2)),
        (NAMES[1], 2, wilson(1, 2), (NAMES[0], 1)),
        (NAMES[2], 3, wilson(2, 3), (NAMES[0], 1)),
    ]
    pairs = report.confused_pairs(predictions)
    assert [(pair["true"], pair["predicted"], pair["videos"]) for pair in pairs] == [
        (NAMES[0], NAMES[1], 2),
        (NAMES[1], NAMES[0], 1),
        (NAMES[2], NAMES[0], 1),
    ]
    assert [pair["share"] for pair in pairs] == pytest.approx([2 / 3, 1 / 2, 1 / 3])


def test_top_5_counts_the_five_likeliest_classes(tmp_path):
    videos = [{"path": "a", "label": label, "scores": [0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]} for label in range(7)]
    found = read_run(write_results(tmp_path, videos=videos, labels=None)).predictions.accuracies()
    assert (found["top1"].mean, found["top5"].mean) == pytest.approx((1 / 7, 5 / 7))


def test_shares_of_each_videos_clips_give_their_accuracy_an_interval(tmp_path):
    shares = [1, 0.5, 0, 1, 0, 1, 0.5, 0]
    videos = [
        video | {"clip_top1": share, "clip_top5": 1.0} for video, share in zip(some_videos(), shares, strict=True)
    ]
    run = read_run(write_results(tmp_path, videos=videos))
    found = run.predictions.accuracies()["clip_top1"]
    assert found == bootstrap(np.array(shares))
    assert found.interval[0] < 0.5 < found.interval[1]
    assert "Clip accuracy has none" not in page(run)


def test_a_class_without_videos_has_no_accuracy(tmp_path):
    run = read_run(write_results(tmp_path, videos=some_videos([0, 1], [0, 0])))
    (row,) = (row for row in report.class_rows(run.predictions) if row["name"] == NAMES[2])
    assert (row["videos"], row["accuracy"], row["confused"]) == (0, None, None)
    assert "sit &amp; wait" in page(run)


def test_curves_are_the_same_from_a_table_and_from_tensorboard(tmp_path):
    write_log(tmp_path / "table" / "csv" / "version_0" / "metrics.csv", LOG)
    write_events(tmp_path / "events", LOG)
    table, events = read_curves(tmp_path / "table"), read_curves(tmp_path / "events")
    assert set(table) == set(events) == set(report.LOGGED) - {"val/map"}  # of another task
    for name in table:
        assert table[name].steps.tolist() == events[name].steps.tolist()
        np.testing.assert_allclose(table[name].values, events[name].values, rtol=1e-6)
    assert table["train/loss_step"].steps.tolist() == [1, 3]
    assert table["train/loss_step"].values.tolist() == [2.0, 1.5]
    assert [chart.title for chart in report.curve_charts(events)] == [
        *("Loss", "Top-1 accuracy", "Learning rate", "Speed")
    ]


@pytest.mark.parametrize("kind", ["table", "events"])
def test_a_run_that_went_on_replaces_what_came_after_its_start(tmp_path, kind):
    first = [{"step": step, "train/loss_step": 5.0} for step in (0, 10, 20, 30)] + [{"step": 25, "val/loss": 5.0}]
    second = [{"step": step, "train/loss_step": 1.0} for step in (20, 30, 40)] + [{"step": 45, "val/loss": 1.0}]
    for number, rows in enumerate((first, second)):
        if kind == "table":
            write_log(tmp_path / "csv" / f"version_{9 + number}" / "metrics.csv", rows)  # 10 comes after 9
        else:
            write_events(tmp_path, rows)
            (written,) = tmp_path.glob("events.out.tfevents.1?????????.*")
            written.rename(tmp_path / f"events.out.tfevents.{number}")
    curves = read_curves(tmp_path)
    assert curves["train/loss_step"].steps.tolist() == [0, 10, 20, 30, 40]
    assert curves["train/loss_step"].values.tolist() == [5, 5, 1, 1, 1]
    assert curves["val/loss"].steps.tolist() == [45]  # that of step 25 was of weights that were lost


def test_losses_that_are_no_numbers_are_left_out_of_curves(tmp_path):
    rows = [{"step": step, "train/loss_step": loss} for step, loss in enumerate((2.0, "nan", "inf", 1.0))]
    write_log(tmp_path / "csv" / "version_0" / "metrics.csv", rows)
    assert read_curves(tmp_path)["train/loss_step"].steps.tolist() == [0, 3]


def test_a_long_curve_is_drawn_as_the_means_of_its_parts():
    steps = np.arange(3000.0)
    (chart,) = report.curve_charts({"learning_rate": Curve(steps, steps % 10)})
    (line,) = chart.series
    assert len(line.x) == len(line.y) == report.CURVE_POINTS
    assert set(line.y) == {4.5}  # each is the mean of 0 to 9
    assert "4.5 at 4.5, 4.5 at 2994.5" in chart.text
    assert "more points than 300" in page(Run("long", curves={"learning_rate": Curve(steps, steps % 10)}))


def test_the_report_refers_to_nothing_outside_and_escapes_names(folder):
    run = read_run(folder)
    html = page(replace(run, name='"><img src=x onerror=alert(2)>'), thumbnail=lambda path: b"jpeg")
    assert not re.search(r"https?://|@import|url\(", html)
    parser = HTMLParser()
    tags = []
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(html)
    for _, attributes in tags:
        assert {"srcset", "action", "data", "background", "onerror"}.isdisjoint(attributes)
        assert all(attributes.get(name, "#").startswith(("#", "data:")) for name in ("src", "href"))
    assert [tag for tag, _ in tags].count("script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert 'src="data:image/jpeg;base64,anBlZw=="' in html
    assert "default-src 'none'; img-src data:" in html


def test_names_of_files_need_not_be_text(tmp_path):
    videos = [video | {"path": "videos/\udcff.mp4"} for video in some_videos()]
    html = page(read_run(write_results(tmp_path, videos=videos)))
    assert "videos/?.mp4" in html.encode().decode()


def test_a_whole_run_has_every_part(folder, checkpoint):
    run = read_run(folder)
    assert run.missing == []
    assert (run.card.epoch, run.card.step) == (5, 1234)
    network = load_trained(checkpoint).network
    assert run.card.parameters == count_parameters(network)
    assert run.card.cost.macs == count_macs(network, (3, 4, 32, 32))
    html = page(run)
    for part in ("Network", "Training", "Confusions", "Classes", "Mistakes", "Bad videos", "Comparison"):
        assert f">{part}</" in html
    for text in ("3 x 4 x 32 x 32", "1,234 steps", "not measured", "No picture: it is gone", "End of file", "50.00 %"):
        assert text in html
    assert "10,000 resamples" in html


@pytest.mark.parametrize(
    ("lacks", "sentence", "gone"),
    [
        ("test/predictions.json", "There is no predictions.json", "Confusions"),
        ("checkpoints", "There is no checkpoint", "Network"),
        ("csv", "There is no training log", "Training"),
    ],
)
def test_what_a_run_lacks_is_left_out_with_a_sentence(folder, lacks, sentence, gone):
    path = folder / lacks
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = read_run(folder)
    assert len(run.missing) == 1
    html = page(run)
    assert sentence in html
    assert f"<h3>{gone}</h3>" not in html
    assert html.count("<h3>") >= 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("test/predictions.json", "{", "JSONDecodeError"),
        ("test/predictions.json", '{"videos": []}', "KeyError: 'bad'"),
        ("test/predictions.json", json.dumps({"videos": some_videos(classes=2), "bad": []}), "below their number"),
        (
            "test/predictions.json",
            json.dumps({"videos": some_videos(classes=4), "bad": []}),
            "3 class names for 4 scores",
        ),
        ("test/alphas.json", '[{"alpha": 0}]', "KeyError: 'gmacs'"),
        ("test/alphas.json", json.dumps([ROWS[0] | {"videos": 0}]), "no accuracies of videos"),
        ("checkpoints/last.ckpt", "no checkpoint", "DamagedCheckpointError"),
        ("csv/version_0/metrics.csv", "step,learning_rate\n1,fast\n", "could not convert string to float"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(folder, name, content, reason):
    (folder / name).unlink()
    (folder / name).write_text(content)
    (sentence,) = read_run(folder).missing
    assert name.rpartition("/")[2] in sentence or "csv" in name
    assert reason in sentence


def test_a_folder_with_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to report on\. There is no checkpoint"):
        read_run(tmp_path)


def test_a_test_of_no_video_is_reported_with_its_bad_ones(tmp_path):
    html = page(read_run(write_results(tmp_path, videos=[], top1=None, clip_top1=None)))
    assert "No video was tested." in html
    assert "End of file" in html


def test_each_alpha_is_timed_with_the_weights_of_the_checkpoint(folder, checkpoint, monkeypatch):
    clip = torch.rand(1, 3, 4, 32, 32)
    monkeypatch.setattr(torch, "rand", lambda *size, device: clip)
    logits = []

    def calls_once(calls, rounds, warmup, device):
        logits.extend(call() for call in calls)
        return [[float(number)] * rounds for number in range(len(calls))]

    monkeypatch.setattr(report, "time_interleaved", calls_once)
    run, without = measure([read_run(folder), Run("no checkpoint")], rounds=2)
    assert run.card.seconds == {"0.25": [0, 0], "0": [1, 1], "0.5": [2, 2]}
    assert without == Run("no checkpoint")
    for alpha, output in zip((0.25, 0.0, 0.5), logits, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(output, load_trained(checkpoint, alpha).network(clip))
    monkeypatch.undo()
    (timed,) = measure([read_run(folder)], rounds=3)
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in timed.card.seconds.values())
    assert measure([run], rounds=0)[0].card.seconds == {}


def test_several_runs_are_compared_at_each_alpha(folder, tmp_path):
    run = measure([read_run(folder)], rounds=1)[0]
    other = replace(read_run(folder), name="other", alphas=())
    points = report.points_of(run)
    assert [(point.name, point.alpha) for point in points] == [
        (f"whole, {row['statistics']} statistics", f"{row['alpha']:g}") for row in ROWS
    ]
    assert points[0].top1 == bootstrap(np.array([1.0] * 6 + [0.0] * 2))
    assert points[0].seconds == run.card.seconds["0"]
    (single,) = report.points_of(other)
    assert (single.name, single.alpha, single.gmacs) == ("other", "0.25", run.card.cost.macs / 1e9)
    charts = report.comparison_charts([run, other], [*points, single])
    assert [chart.title for chart in charts] == [
        *("Accuracy over arithmetic", "Accuracy over time", "Validation over training")
    ]
    assert [(one.name, len(one.intervals)) for one in charts[0].series] == [
        *(("whole, checkpoint statistics", 3), ("whole, re-estimated statistics", 3), ("other", 1))
    ]
    assert charts[0].series[0].x == [1, 0.875, 0.75][::-1]
    assert charts[0].series[0].y == [75, 75, 75]
    assert charts[0].series[0].labels == ["\N{GREEK SMALL LETTER ALPHA} 0.5", *charts[0].series[0].labels[1:]]
    assert [len(one.intervals) for one in charts[1].series] == [3, 3]  # the other was not measured
    html = page(run, other)
    assert html.count('<th scope="row" class="path">') == 7
    assert "Not all of these were tested on the same videos" not in html
    fewer = read_run(write_results(tmp_path / "fewer", videos=some_videos()[:5]))
    assert "Not all of these were tested on the same videos" in page(run, fewer)


def test_a_run_tested_at_other_alphas_only_is_compared_with_itself(folder):
    (folder / "test" / "predictions.json").unlink()
    html = page(read_run(folder))
    assert "Accuracy over arithmetic" in html
    assert html.count('<th scope="row" class="path">') == 6


def test_a_picture_shows_frames_in_order_of_time(tmp_path):
    for width in (48, 96):
        grey = np.arange(40, dtype=np.uint8)[:, None, None, None] * 5
        write_video(tmp_path / f"{width}.mp4", np.broadcast_to(grey, (40, 48, width, 3)), 10)
        image = decode_jpeg(
            torch.frombuffer(bytearray(tool.picture(str(tmp_path / f"{width}.mp4"))), dtype=torch.uint8)
        )
        rows, columns = (1, 4) if width == 48 else (2, 2)
        height = image.shape[1] // rows
        tiles = [
            image[:, row * height + 9 : (row + 1) * height - 9, 9 + part : part + image.shape[2] // columns - 9]
            for row in range(rows)
            for part in range(0, image.shape[2], image.shape[2] // columns)
        ]
        assert [tile.float().mean().item() for tile in tiles] == pytest.approx([25, 75, 125, 175], abs=4)


def test_a_file_without_a_picture_gives_the_reason(tmp_path):
    assert tool.picture(str(tmp_path / "gone.mp4")) == "No such file or directory"
    (tmp_path / "torn.mp4").write_bytes(b"\0" * 100)
    assert tool.picture(str(tmp_path / "torn.mp4")) == "Invalid data found when processing input"


def test_runs_are_called_by_what_tells_their_folders_apart():
    assert tool.names_of([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert tool.names_of([Path("/a/one/test"), Path("/a/two/test")]) == ["one/test", "two/test"]
    assert tool.names_of([Path("/a/one")]) == ["one"]


def test_the_tool_writes_the_report_of_several_runs(folder, tmp_path):
    write_results(tmp_path / "less")
    finished = run_tool("report.py", folder, tmp_path / "less", folder, "--rounds=1", f"--output={tmp_path / 'r.html'}")
    assert finished.returncode == 0, finished.stderr
    assert "less: There is no checkpoint, so the report does not describe the network." in finished.stdout
    html = (tmp_path / "r.html").read_text()
    assert "<h1>2 runs</h1>" in html
    assert html.count("No picture: No such file or directory") == 8
    assert "batch: 1, float32, rounds: 1" in html


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "the following arguments are required: RUN_DIR"),
        (["nowhere"], "nowhere: nothing to report on. There is no checkpoint"),
        (["nowhere", "--rounds=-1"], "--rounds must be at least 0, got -1"),
        (["nowhere", "--round=1"], "unrecognized arguments: --round=1"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(monkeypatch, capsys, options, part):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(SystemExit, match="2"):
        tool.main(options)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report.py: error: ")
    assert part in line


def test_a_report_that_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "report.html"
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(write_results(tmp_path / "run")), f"--output={output}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line


def test_testing_writes_the_report_of_the_checkpoints_run(checkpoint, tmp_path):
    for label in range(3):
        write_video(tmp_path / f"{label}.mp4", np.full((8, 36, 36, 3), 80 * label, np.uint8), 8)
    (tmp_path / "list.csv").write_text("".join(f"{label}.mp4 {label}\n" for label in range(3)))
    run = tmp_path / "run"
    write_log(run / "csv" / "version_0" / "metrics.csv", LOG)
    shutil.copytree(checkpoint.parent, run / "checkpoints")
    options = [
        *("--cfg=configs/quickstart.yaml", f"--ckpt={run / 'checkpoints' / 'last.ckpt'}", f"--data.root={tmp_path}"),
        *(f"--data.{name}_list={tmp_path / 'list.csv'}" for name in ("train", "val")),
        *("--data.crop_size=32", "--data.short_side=[32, 36]", "--data.test_crop_size=32", "--data.clip_frames=4"),
        *("--data.num_workers=0", f"--output={tmp_path / 'test'}", "--report"),
    ]
    finished = run_tool("test_net.py", *options)
    assert finished.returncode == 0, finished.stderr
    assert f"report: {tmp_path / 'test' / 'report.html'}" in finished.stdout
    html = (tmp_path / "test" / "report.html").read_text()
    assert "<h1>run</h1>" in html
    for part in ("Network", "Training", "Confusions"):
        assert f"<h3>{part}</h3>" in html
    (tmp_path / "test" / "predictions.json").unlink()
    finished = run_tool("test_net.py", *options, "--alphas=0,.5", "--statistics_batches=0")
    assert finished.returncode == 0, finished.stderr
    assert "Accuracy over time" in (tmp_path / "test" / "report.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_report_and_sorts_its_tables(browser, folder, tmp_path, scheme):
    names = [f"class {number} of a rather long name" for number in range(30)]
    labels = [number for number in range(29) for _ in range(3)]
    guesses = [label if place % 3 or label < 10 else 0 for place, label in enumerate(labels)]
    videos = some_videos(labels, guesses, classes=30)
    write_video(tmp_path / "clip.mp4", np.full((8, 36, 64, 3), 99, np.uint8), 8)
    videos = [video | {"path": str(tmp_path / "clip.mp4")} for video in videos]
    many = read_run(write_results(tmp_path / "many", videos=videos, labels=names))
    (tmp_path / "report.html").write_text(page(read_run(folder), many, thumbnail=tool.picture))
    told = []
    tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: told.append(request.url) if request.url.startswith("http") else None)
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.evaluate("[...document.images].length") == 19
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    for width in (390, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    table = tab.locator("#run2-classes table")

    def column(number):
        return table.locator(f"tbody tr :nth-child({number})").all_inner_texts()

    accuracy = table.get_by_role("button", name="Accuracy")
    accuracy.click()
    assert column(4) == ["66.7 %"] * 19 + ["100.0 %"] * 10 + ["-"]
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    accuracy.focus()
    tab.keyboard.press("Enter")
    assert column(4) == ["100.0 %"] * 10 + ["66.7 %"] * 19 + ["-"]  # what has no accuracy stays last
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    table.get_by_role("button", name="Class").click()
    assert column(2) == sorted(names)
    table.get_by_role("button", name="No.").click()
    assert column(1) == [str(number) for number in range(30)]
    assert table.locator("th[aria-sort]").count() == 1
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(244, 246, 248)", "dark": "rgb(17, 22, 28)"}[scheme]
    tab.close()
    assert told == []
