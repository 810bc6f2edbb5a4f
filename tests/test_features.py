"""Embeddings: values against the classifier's own arithmetic, batches over videos, files, and runs that go on."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import settle
from test_predict import LABELS, write_checkpoint
from torch import nn

import octvideo
from octvideo.commands import features as command
from octvideo.commands import options as command_options
from octvideo.data.motions import write_video
from octvideo.evaluation.features import Extractor, find_classifier, pooled
from octvideo.evaluation.prediction import Predictor
from octvideo.models.checkpoint import load_trained
from octvideo.models.octavize import octavize

CLIPS = {"clip_frames": 4, "frame_stride": 2, "target_fps": None, "test_crop_size": 32}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt", LABELS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of 1.2, 2.8 and 2 seconds, and one that is broken."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a.mp4", 30), ("b.mp4", 70), ("d.mp4", 50)):
        coarse = np.random.default_rng(frames).integers(0, 256, (frames, 5, 8, 3), dtype=np.uint8)
        write_video(folder / name, coarse.repeat(8, 1).repeat(8, 2), 25)
    (folder / "c.mp4").write_text("no video")
    return folder


def good(videos):
    return [str(videos / name) for name in ("a.mp4", "b.mp4", "d.mp4")]


def logits_of(predictor, clips):
    with torch.no_grad():
        return predictor.logits(torch.from_numpy(clips)).numpy()


def test_the_classifier_makes_of_a_videos_features_the_mean_of_its_views_logits(checkpoint, videos):
    found = octvideo.features(checkpoint, good(videos), num_clips=2, num_crops=3, device="cpu")
    assert found.paths == good(videos)
    assert (found.features.dtype, found.seconds, found.bad) == (np.float32, None, [])
    predictor = Predictor(load_trained(checkpoint), num_clips=2, num_crops=3)
    head = find_classifier(predictor.trained.network, torch.zeros(1, 3, 4, 32, 32))
    assert head is predictor.trained.network.get_submodule("blocks.6.proj")
    assert found.features.shape == (3, head.in_features)
    wanted = [logits_of(predictor, predictor.views(path)[1]).mean(0) for path in found.paths]
    made = head(torch.from_numpy(found.features)).detach().numpy()
    np.testing.assert_allclose(made, wanted, atol=1e-4)
    assert np.abs(np.diff(wanted, axis=0)).max() > 0.01


def test_rows_for_clips_and_seconds_have_their_middles(checkpoint, videos):
    predictor = Predictor(load_trained(checkpoint), num_clips=3, num_crops=2)
    head = find_classifier(predictor.trained.network, torch.zeros(1, 3, 4, 32, 32))
    path = good(videos)[1]
    found = octvideo.features(predictor.trained, path, "clip", num_clips=3, num_crops=2)
    assert found.paths == [path] * 3
    # Clips span 16 frames of 70 at 25 a second: by the protocol they start at frames 0, 54 / 3 and 2 * 54 / 3.
    np.testing.assert_allclose(found.seconds, (np.array([0, 18, 36]) + 8) / 25)
    wanted = logits_of(predictor, predictor.views(path)[1]).reshape(3, 2, -1).mean(1)
    np.testing.assert_allclose(head(torch.from_numpy(found.features)).detach(), wanted, atol=1e-4)

    found = octvideo.features(predictor.trained, path, "second")
    np.testing.assert_allclose(found.seconds, [0.5, 1.5, 2.4])
    (_, clips, _), *others = predictor.windows(path)
    assert not others
    np.testing.assert_allclose(head(torch.from_numpy(found.features)).detach(), logits_of(predictor, clips), atol=1e-4)


class Small(nn.Module):
    """A network that keeps the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Linear(3, 3)  # has as many outputs, but is not the last
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(3, 3))
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return self.head(self.squeeze(x.mean((2, 3, 4))).tanh())


@pytest.mark.parametrize("per", ["video", "clip", "second"])
def test_batches_hold_clips_of_several_videos_and_change_nothing(videos, per, monkeypatch):
    torch.manual_seed(0)
    network = Small()
    monkeypatch.setattr("octvideo.evaluation.prediction.FRAMES_TOGETHER", 4)  # a second at a time
    paths = [*good(videos)[:2], videos / "c.mp4", *good(videos)[2:]]

    def extract(batch):
        network.batches.clear()
        return octvideo.features(network, paths, per, batch=batch, preprocessing=CLIPS, num_clips=2, num_crops=1)

    one, many = extract(1), extract(5)
    assert network.training
    assert max(network.batches) == 5
    assert sum(network.batches) == 1 + {"second": 1 + 3 + 2}.get(per, 6)  # the first is to find the classifier
    for found in (one, many):
        assert [(bad.path, bad.reason) for bad in found.bad] == [
            (str(videos / "c.mp4"), "Invalid data found when processing input")
        ]
        assert list(dict.fromkeys(found.paths)) == good(videos)
    np.testing.assert_allclose(one.features, many.features, atol=1e-6)
    if per != "video":
        np.testing.assert_array_equal(one.seconds, many.seconds)


def test_a_video_that_breaks_in_the_middle_has_no_rows(videos, monkeypatch):
    monkeypatch.setattr("octvideo.evaluation.prediction.FRAMES_TOGETHER", 4)
    predictor = Predictor(Small(), preprocessing=CLIPS, decode_timeout_seconds=None)
    windows = predictor.windows

    def breaks(path):
        for number, part in enumerate(windows(path)):
            if path.endswith("b.mp4") and number == 2:
                raise octvideo.errors.DecodeError(path, "broken behind its second second")
            yield part

    monkeypatch.setattr(predictor, "windows", breaks)
    results = list(Extractor(predictor, "second", batch=2)(good(videos)))
    assert [type(one).__name__ for one in results] == ["VideoFeatures", "BadVideo", "VideoFeatures"]
    assert [len(one.features) for one in results if hasattr(one, "features")] == [1, 2]


class Pointwise(nn.Module):
    """Ends in a convolution and a mean, as torchvision's S3D does."""

    def __init__(self, channels=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1))
        self.head = nn.Conv3d(8, 5, 1)

    def forward(self, x):
        return self.head(self.body(x)).mean((2, 3, 4))


class Frames(nn.Module):
    """Sees each frame by itself, and averages logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        frames = x.transpose(1, 2).flatten(0, 1)
        return self.head(self.body(frames).relu().mean((2, 3))).unflatten(0, (len(x), -1)).mean(1)


class Calls(Frames):
    """The same, a frame after the other."""

    def forward(self, x):
        return torch.stack([self.head(self.body(frame).relu().mean((2, 3))) for frame in x.unbind(2)]).mean(0)


@pytest.mark.parametrize("build", [Pointwise, Frames, Calls, lambda: octavize(Pointwise(), {"": 0.5, "head": 0})])
def test_any_network_with_a_classifier_will_do(build, videos):
    torch.manual_seed(0)
    network = build()
    predictor = Predictor(network, preprocessing=CLIPS, num_clips=2, num_crops=1)
    found = octvideo.features(network, good(videos), preprocessing=CLIPS, num_clips=2, num_crops=1)
    assert found.features.shape == (3, 8)
    made = torch.from_numpy(found.features) @ network.head.weight.flatten(1).T + network.head.bias
    wanted = [logits_of(predictor, predictor.views(path)[1]).mean(0) for path in good(videos)]
    np.testing.assert_allclose(made.detach(), wanted, atol=1e-5)


@pytest.mark.parametrize(("name", "width"), [("slowfast_r50", 16), ("x3d_xs", 8)])
def test_heads_of_the_zoo_average_so_that_their_classifiers_fit_the_features(name, width, videos):
    torch.manual_seed(0)
    network = settle(octvideo.create_model(name, alpha=(0.25, 0.25, 0.25, 0.25), num_classes=5, width=width))
    how = CLIPS | {"clip_frames": 8, "test_crop_size": 224}
    predictor = Predictor(network, preprocessing=how, num_clips=2, num_crops=1)
    found = octvideo.features(network, good(videos)[0], preprocessing=how, num_clips=2, num_crops=1)
    head = find_classifier(network, torch.zeros(1, 3, 8, 64, 64))
    wanted = logits_of(predictor, predictor.views(good(videos)[0])[1]).mean(0)
    np.testing.assert_allclose(head(torch.from_numpy(found.features))[0].detach(), wanted, atol=1e-4)


def test_features_of_tokens_are_averaged():
    x = torch.arange(24.0).view(2, 3, 4)
    torch.testing.assert_close(pooled(x, 2, True), x.mean(1))
    torch.testing.assert_close(pooled(x, 2, False), x.mean(2))
    torch.testing.assert_close(pooled(x[:, :, 0], 1, True), x[:, :, 0].mean(0, keepdim=True))


def test_networks_and_options_that_cannot_be_used_are_refused(videos):
    path = good(videos)[0]
    network = nn.Sequential(nn.Conv3d(3, 5, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"no classifier to read features of: expected an nn.Linear .* with 5 outputs"):
        octvideo.features(network, path, preprocessing=CLIPS)
    broken = Small()
    nn.init.constant_(broken.squeeze.weight, float("nan"))
    with pytest.raises(ValueError, match="features are not finite"):
        octvideo.features(broken, path, preprocessing=CLIPS)
    with pytest.raises(ValueError, match="per must be video, clip or second, got 'frame'"):
        octvideo.features(Small(), path, "frame")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        octvideo.features(Small(), path, batch=0)
    nothing = octvideo.features(Small(), [])
    assert (nothing.paths, nothing.features.shape, nothing.bad) == ([], (0, 0), [])


@pytest.fixture
def run_here(checkpoint, monkeypatch, capsys):
    """Runs the command in this process; gives its exit status and what it printed."""

    def run(*options, few=("--clips=2", "--crops=1", "--device=cpu")):
        monkeypatch.setattr(command_options, "program", "octvideo features")
        try:
            status = command.main([*map(str, options), *few])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("per", ["video", "clip"])
def test_both_kinds_of_files_hold_the_rows_and_bad_videos_are_listed(run_here, checkpoint, videos, tmp_path, per):
    wanted = octvideo.features(checkpoint, good(videos), per, num_clips=2, num_crops=1, device="cpu")
    for name in ("f.npz", "f.parquet"):
        options = (videos, "--ckpt", checkpoint, "--output", tmp_path / "new" / name, "--per", per)
        status, printed, error = run_here(*options)
        assert (status, error) == (1, "")
        rows = f"{len(wanted.paths)} rows of {wanted.features.shape[1]} numbers: {tmp_path / 'new' / name}"
        assert f"3 videos embedded, 1 bad; {rows}\n" in printed
        assert f"  {videos / 'c.mp4'}: Invalid data found when processing input\n" in printed
    assert sorted(os.listdir(tmp_path / "new")) == ["f.npz", "f.parquet"]
    arrays = np.load(tmp_path / "new" / "f.npz", allow_pickle=False)
    table = pyarrow.parquet.read_table(tmp_path / "new" / "f.parquet").to_pydict()
    for columns in (arrays, table):
        assert list(columns) == ["paths", "features"] + ["seconds"] * (per == "clip")
        assert list(columns["paths"]) == wanted.paths
        np.testing.assert_allclose(np.array(columns["features"], np.float32), wanted.features, atol=1e-5)
        if per == "clip":
            np.testing.assert_array_equal(columns["seconds"], wanted.seconds)


def test_names_of_no_encoding_and_videos_named_twice_come_through(run_here, checkpoint, videos, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.mp4"
    shutil.copy(os.fsencode(videos / "a.mp4"), path)
    for name in ("f.npz", "f.parquet"):
        assert (
            run_here(tmp_path, tmp_path, "--ckpt", checkpoint, "--output", tmp_path / name)[0] == 0
            or name == "f.parquet"
        )
    arrays = np.load(tmp_path / "f.npz")
    assert list(arrays["paths"]) == [os.fsdecode(path)] * 2
    np.testing.assert_array_equal(*arrays["features"])
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet")
    assert table["paths"][0].as_py().endswith("\\xff.mp4")


def test_an_interrupted_run_goes_on_where_it_was(run_here, checkpoint, videos, tmp_path, monkeypatch):
    shutil.copytree(videos, tmp_path / "videos")
    output = tmp_path / "f.npz"
    options = (tmp_path / "videos", "--ckpt", checkpoint, "--output", output)
    read = []
    views = Predictor.views

    def interrupted(self, path):
        if path.endswith("d.mp4") and not (tmp_path / "on").exists():
            raise KeyboardInterrupt
        read.append(os.path.basename(path))
        return views(self, path)

    monkeypatch.setattr(Predictor, "views", interrupted)
    few = ("--clips=2", "--crops=1", "--device=cpu", "--batch=2")
    status, printed, error = run_here(*options, few=few)
    assert (status, printed) == (130, "")
    assert error == f"stopped: repeat the command to go on from {output}.partial\n"
    assert not output.exists()
    assert read == ["a.mp4", "b.mp4", "c.mp4"]

    before = (tmp_path / "f.npz.partial").read_bytes()
    status, printed, error = run_here(*options, few=(*few, "--per=clip"))
    assert (status, printed, error.count("\n")) == (2, "", 1)
    assert f"{output}.partial is of an interrupted run with another checkpoint or other options: give the same" in error
    assert (tmp_path / "f.npz.partial").read_bytes() == before

    (tmp_path / "f.npz.partial").write_bytes(before + b'\n{"path": "torn')
    (tmp_path / "on").touch()
    read.clear()
    shutil.copy(videos / "d.mp4", tmp_path / "videos" / "b.mp4")  # another video now
    assert run_here(*options, few=few)[0] == 1
    assert read == ["b.mp4", "c.mp4", "d.mp4"]  # bad ones get another chance
    found = np.load(output)
    wanted = octvideo.features(
        checkpoint, [videos / name for name in ("a.mp4", "d.mp4", "d.mp4")], num_clips=2, num_crops=1
    )
    np.testing.assert_allclose(found["features"], wanted.features, atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["f.npz", "on", "videos"]


def test_without_a_good_video_nothing_is_written(run_here, checkpoint, videos, tmp_path):
    status, printed, _ = run_here(videos / "c.mp4", "--ckpt", checkpoint, "--output", tmp_path / "f.npz")
    assert status == 1
    assert printed.startswith("0 videos embedded, 1 bad; nothing is written\n")
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_a_bad_video(run_here, checkpoint, videos, tmp_path):
    (tmp_path / "list.txt").write_text(f"{videos}/a.mp4 999\n{videos}/gone.mp4 0\n")
    status, printed, _ = run_here(tmp_path / "list.txt", "--ckpt", checkpoint, "--output", tmp_path / "f.npz")
    assert status == 1
    assert f"  {videos}/gone.mp4: No such file or directory\n" in printed
    assert len(np.load(tmp_path / "f.npz")["features"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{video}", "--ckpt={ckpt}"], "the following arguments are required: --output"),
        (["{video}", "--output=f.npz"], "the following arguments are required: --ckpt"),
        (
            ["{video}", "--ckpt={ckpt}", "--output=f.csv"],
            "--output must be a file that ends in .npz or .parquet, got f.csv",
        ),
        (
            ["{video}", "--ckpt={ckpt}", "--output={folder}/f.npz", "--per=frame"],
            "argument --per: invalid choice: 'frame'",
        ),
        (
            ["{video}", "--ckpt={ckpt}", "--output={folder}/f.npz", "--per=second", "--clips=2"],
            "--clips and --crops are for",
        ),
        (
            ["{video}", "--ckpt={ckpt}", "--output={folder}/f.npz", "--batch=0"],
            "argument --batch: must be a whole number",
        ),
        (["{folder}", "--ckpt={ckpt}", "--output={folder}/f.npz"], "no videos found in {folder}"),
        (["{video}", "--ckpt={ckpt}", "--output={folder}/d.npz"], "--output {folder}/d.npz: that is a folder"),
        (["{video}", "--ckpt=missing.ckpt", "--output={folder}/f.npz"], "No such file or directory: 'missing.ckpt'"),
    ],
)
def test_mistakes_in_the_command_are_one_line_each(run_here, checkpoint, videos, tmp_path, options, message):
    (tmp_path / "d.npz").mkdir()
    names = {"folder": str(tmp_path), "video": str(videos / "a.mp4"), "ckpt": str(checkpoint)}
    status, printed, error = run_here(*(option.format(**names) for option in options), few=())
    assert (status, printed) == (2, ""), error
    assert error.startswith("octvideo features: error: ")
    assert message.format(**names) in error
    assert error.count("\n") == 1


def test_parquet_without_pyarrow_says_what_to_install(run_here, checkpoint, videos, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, error = run_here(videos, "--ckpt", checkpoint, "--output=f.parquet")
    assert (status, error.count("\n")) == (2, 1)
    assert "pip install 'octvideo[features]'" in error


def test_what_a_partial_file_holds_is_plain_text(run_here, checkpoint, videos, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write", interrupt)
    assert run_here(videos / "a.mp4", "--ckpt", checkpoint, "--output", tmp_path / "f.npz")[0] == 130
    lines = [json.loads(line) for line in (tmp_path / "f.npz.partial").read_text().splitlines() if line]
    assert (lines[0]["per"], lines[0]["clip_frames"], len(lines)) == ("video", 4, 2)
    assert lines[1]["path"] == str(videos / "a.mp4")
