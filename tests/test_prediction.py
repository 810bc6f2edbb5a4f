"""Predictions of one video: values against frames that PyAV decodes here, timelines, and what is refused."""

import dataclasses
import gc
import inspect
import os
import subprocess
import sys
import weakref

import av
import numpy as np
import pytest
import torch
from conftest import FORKS, ROOT
from torch import nn

import octvideo
from octvideo.data.module import VideoData
from octvideo.data.motions import write_video
from octvideo.data.sampling import Sampling
from octvideo.data.video import Video
from octvideo.errors import DecodeError
from octvideo.evaluation import prediction
from octvideo.evaluation.prediction import Prediction, Predictor, Timeline, second_edges, window_around
from octvideo.models.checkpoint import load_trained
from octvideo.training.recognizer import Recognizer

CLIPS = {"clip_frames": 4, "frame_stride": 4, "target_fps": None, "test_crop_size": 48, "mean": 0.4, "std": 0.2}


class Small(nn.Module):
    """A network that each pixel of a clip matters to; it keeps the sizes of its batches."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(3, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return 5 * self.head(self.features(x).mean((2, 3, 4)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """60 different frames of 64 x 48 pixels at 25 a second: 2.4 s."""
    path = tmp_path_factory.mktemp("videos") / "noise.mp4"
    coarse = np.random.default_rng(0).integers(0, 256, (60, 6, 8, 3), dtype=np.uint8)
    write_video(path, coarse.repeat(8, 1).repeat(8, 2), 25)
    return path


def reference(network, path, clips):
    """Probabilities of the clips with these (frame numbers, left edge), from frames decoded here."""
    with av.open(str(path)) as container:
        frames = [frame.reformat(format="rgb24", interpolation="BICUBIC") for frame in container.decode(video=0)]
    images = np.stack([frame.to_ndarray() for frame in frames]).astype(np.float64)
    views = np.stack([images[numbers][:, :, left : left + 48] for numbers, left in clips]).transpose(0, 4, 1, 2, 3)
    with torch.no_grad():
        logits = network.double()(torch.from_numpy((views / 255 - 0.4) / 0.2))
    network.float()
    return logits.softmax(1).numpy()


def test_scores_are_the_softmax_of_all_views_on_average(network, video):
    """Clips of 16 frames start at frames 0 and 44 / 2; crops of 48 lie at the left, in the middle and at the right."""
    views = [(start + np.array([0, 5, 10, 15]), left) for start in (0, 22) for left in (0, 8, 16)]
    wanted = reference(network, video, views).mean(0)
    found = octvideo.predict(network, video, preprocessing=CLIPS, num_clips=2)
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5)
    assert found.scores.dtype == np.float32
    assert found.path == str(video)
    assert wanted.max() - wanted.min() > 0.05


def test_the_timeline_has_a_clip_of_the_centre_around_the_middle_of_each_second(network, video):
    """Seconds are [0, 1] and [1, 2.4]; clips of 16 frames around 0.5 and 1.7 s start at 12.5 - 8 and 42.5 - 8."""
    views = [(start + np.array([0, 5, 10, 15]), 8) for start in (4, 34)]
    found = octvideo.predict(network, video, preprocessing=CLIPS).timeline
    np.testing.assert_allclose(found.scores, reference(network, video, views), atol=1e-5)
    np.testing.assert_allclose(found.edges_seconds, [0, 1, 2.4])
    np.testing.assert_allclose(found.seconds, [0.5, 1.7])
    assert np.abs(found.scores[0] - found.scores[1]).max() > 0.01


def test_the_one_clip_and_crop_are_those_in_the_centre(network, video):
    wanted = reference(network, video, [(22 + np.array([0, 5, 10, 15]), 8)])[0]
    found = octvideo.predict(network, video, preprocessing=CLIPS, num_clips=1, num_crops=1)
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5)


def test_a_checkpoint_and_what_was_opened_of_it_give_the_same(video, tmp_path):
    torch.manual_seed(0)
    module = Recognizer("i3d_r50", alpha=0.25, num_classes=3, width=8, mean=0.4, std=0.2).eval()
    data = {"labels": ["run", "jump", "sit"], "preprocessing": CLIPS | {"test_crop_size": 32, "mirror": True}}
    state = {"hyper_parameters": dict(module.hparams), "VideoData": data, "state_dict": module.state_dict()}
    torch.save(state, tmp_path / "some.ckpt")
    one = octvideo.predict(tmp_path / "some.ckpt", video, num_clips=1, device="cpu")
    other = octvideo.predict(load_trained(tmp_path / "some.ckpt"), str(video), num_clips=1)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.labels == ["run", "jump", "sit"]
    named = octvideo.predict(load_trained(tmp_path / "some.ckpt"), video, num_clips=1, labels=["a", "b", "c"])
    assert named.labels == ["a", "b", "c"]


def test_each_colour_can_have_its_own_mean_and_deviation(network, video):
    same = octvideo.predict(network, video, preprocessing=CLIPS | {"mean": [0.4] * 3, "std": [0.2] * 3}, num_clips=1)
    other = octvideo.predict(network, video, preprocessing=CLIPS | {"mean": [0.4, 0.1, 0.4]}, num_clips=1)
    one = octvideo.predict(network, video, preprocessing=CLIPS, num_clips=1)
    np.testing.assert_array_equal(same.scores, one.scores)
    assert np.abs(other.scores - one.scores).max() > 0.01
    assert one.labels == ["class 0", "class 1", "class 2"]


def test_the_default_preprocessing_of_a_module_is_that_of_tests_on_kinetics():
    data, recognizer = VideoData().preprocessing, inspect.signature(Recognizer).parameters
    for name, value in dataclasses.asdict(Predictor(nn.Linear(1, 1)).trained.preprocessing).items():
        assert value == (recognizer[name].default if name in ("mean", "std") else getattr(data, name)), name


def test_a_network_in_training_mode_predicts_in_evaluation_mode_and_stays_as_it_was(network, video):
    wanted = octvideo.predict(network, video, preprocessing=CLIPS, num_clips=1).scores
    statistics = network.features[1].running_mean.clone()
    network.train()
    network.features[0].eval()
    np.testing.assert_array_equal(octvideo.predict(network, video, preprocessing=CLIPS, num_clips=1).scores, wanted)
    torch.testing.assert_close(network.features[1].running_mean, statistics)
    assert [part.training for part in (network, network.features, network.features[0])] == [True, True, False]


def test_a_long_video_is_read_in_stretches_and_predicted_in_batches(network, tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (130, 48, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "long.mp4", frames, 5)  # 26 s
    options = {"preprocessing": CLIPS, "decode_timeout_seconds": None}  # so that it is read here
    whole = octvideo.predict(network, tmp_path / "long.mp4", **options)
    asked, images_at = [], Video.images_at
    monkeypatch.setattr(Video, "images_at", lambda *args: (asked.append(len(args[1])), images_at(*args))[1])
    monkeypatch.setattr(prediction, "FRAMES_TOGETHER", 25)
    network.batches.clear()
    parts = octvideo.predict(network, tmp_path / "long.mp4", **options)
    np.testing.assert_allclose(parts.timeline.scores, whole.timeline.scores, atol=1e-6)
    np.testing.assert_array_equal(parts.scores, whole.scores)
    assert asked == [40, 24, 24, 24, 24, 8]  # 10 views; 6 windows of 4 frames at a time
    assert network.batches == [10, 10, 10, 6, 6, 6, 6, 2]
    assert len(whole.timeline.scores) == 26


def test_one_process_decodes_all_videos_of_a_predictor(network, video, monkeypatch):
    predictor, forks, fork = Predictor(network, preprocessing=CLIPS, num_clips=1), [], os.fork
    monkeypatch.setattr(os, "fork", lambda: (forks.append(1), fork())[1])
    for _ in range(3):
        predictor(video)
    assert len(forks) == 2  # one for views, one for windows


def test_a_dropped_predictor_frees_its_network_at_once(network, video):
    gc.collect()
    gc.disable()
    try:
        predictor = Predictor(network, num_clips=1, num_crops=1)
        predictor(video)
        dropped = weakref.ref(predictor)
        del predictor
        assert dropped() is None
    finally:
        gc.enable()


def some(scores, edges=None):
    """A prediction with a timeline of these scores."""
    scores = np.array(scores, dtype=np.float32)
    edges = np.arange(len(scores) + 1.0) if edges is None else np.array(edges)
    return Prediction("a.mp4", scores.mean(0), ["run", "jump", "sit"], Timeline(edges, scores))


def test_the_most_likely_classes_come_first():
    found = some([[0.2, 0.5, 0.3]])
    assert found.top(2) == [("jump", 1, pytest.approx(0.5)), ("sit", 2, pytest.approx(0.3))]
    assert [best.label for best in found.top(9)] == ["jump", "sit", "run"]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        found.top(0)


def test_segments_are_the_stretches_in_which_a_class_has_half_of_its_peak():
    run = [0.9, 0.5, 0.2, 0.1, 0.45, 0.9]
    jump = [0.0, 0.4, 0.7, 0.6, 0.35, 0.0]  # sit is never the most likely one
    found = some([[a, b, 1 - a - b] for a, b in zip(run, jump, strict=True)], [0, 1, 2, 3, 4, 5, 5.8])
    assert [(one.start_seconds, one.end_seconds, one.label, one.number) for one in found.segments()] == [
        (0, 2, "run", 0),
        (1, 5, "jump", 1),
        (4, 5.8, "run", 0),
    ]
    assert [one.mean_score for one in found.segments()] == pytest.approx([0.7, 2.05 / 4, 0.675])
    assert {one.label for one in found.segments(1)} == {"run"}


def test_a_moment_lies_in_a_second_and_outside_of_the_video_in_the_nearest():
    timeline = some(np.eye(3)[[0, 1, 2]], [0, 1, 2, 3.4]).timeline
    found = [timeline.second_at(seconds) for seconds in (-1, 0, 0.99, 1, 1.5, 2, 3.3, 3.4, 9)]
    assert found == [0, 0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("duration", "edges"),
    [(0.04, [0, 0.04]), (1.4, [0, 1.4]), (1.6, [0, 1, 1.6]), (2.0, [0, 1, 2]), (3.4, [0, 1, 2, 3.4])],
)
def test_the_last_second_takes_what_is_left(duration, edges):
    assert second_edges(duration).tolist() == edges


@pytest.mark.parametrize("protocol", ["slowfast", "pytorchvideo", "mmaction", "uniform"])
@pytest.mark.parametrize(("target_fps", "span"), [(None, 16), (30, 16 * 25 / 30), (12.5, 32)])
def test_windows_lie_around_their_moments_within_the_video(protocol, target_fps, span):
    sampling = Sampling(4, 4, protocol, target_fps)
    for seconds in np.arange(0, 8, 0.13):
        found = window_around(sampling, 200, 25, seconds)
        assert len(found) == 4
        assert (np.diff(found) > 0).all()
        assert found[0] >= 0
        assert found[-1] < 200
        assert np.ptp(found) < span
        if span < 25 * seconds < 200 - span:
            assert abs(found.mean() - 25 * seconds) < 4, seconds
    exact = Sampling(4, 4, protocol)
    np.testing.assert_array_equal(window_around(exact, 16, 25, 0.1), exact.centre_clip(16, 25)[0])


def test_a_window_of_a_short_video_is_its_centre_clip(network, tmp_path):
    sampling = Sampling(4, 4, "mmaction")
    np.testing.assert_array_equal(window_around(sampling, 3, 25, 0.06), sampling.centre_clip(3, 25)[0])
    write_video(tmp_path / "one.mp4", np.full((1, 48, 48, 3), 99, np.uint8), 25)
    found = octvideo.predict(network, tmp_path / "one.mp4", preprocessing=CLIPS)
    np.testing.assert_allclose(found.timeline.scores, [found.scores], atol=1e-6)  # all frames of all views are the same
    np.testing.assert_allclose(found.timeline.edges_seconds, [0, 0.04])


def test_bad_videos_are_decode_errors_with_their_reason(network, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    predictor = Predictor(network, preprocessing=CLIPS)
    for name, reason in (
        ("missing.mp4", "No such file"),
        ("empty.mp4", "Invalid data"),
        ("text.mp4", "Invalid data"),
        ("sound.mp4", "no video stream"),
    ):
        with pytest.raises(DecodeError, match=reason) as caught:
            predictor(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)


def hang_and_go_on(pipe, video):
    predictor = Predictor(Small(), preprocessing=CLIPS, num_clips=1, decode_timeout_seconds=2)
    with pytest.raises(DecodeError, match=r"pipe\.mp4: no result within 2 s: the decoder was killed"):
        predictor(pipe)
    for read in (predictor._read_views, predictor._read_windows):
        read.timeout_seconds = 60  # on a busy machine the good video may take longer than the bad one may hang
    assert predictor(video).scores.shape == (3,)


def test_a_decoder_that_hangs_is_a_decode_error(video, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    # In a process that has read no video itself: forks of one in which other tests had read some hung now and then.
    process = FORKS.Process(target=hang_and_go_on, args=(tmp_path / "pipe.mp4", video))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clips": 0}, "num_clips must be at least 1, got 0"),
        ({"num_crops": -1}, "num_crops must be at least 1, got -1"),
        ({"decode_timeout_seconds": 0}, "decode_timeout_seconds must be positive or None, got 0"),
        ({"preprocessing": {"frames": 8}}, "preprocessing must be of clip_frames, .*, std, got frames"),
        ({"preprocessing": {"frame_stride": 0}}, "frame_stride must be at least 1, got 0"),
        ({"backend": "gif"}, "backend must be auto, .*, got 'gif'"),
        ({"labels": ["run"]}, "expected a label for each of the network's 3 classes, got 1"),
    ],
)
def test_wrong_options_are_refused(network, video, options, message):
    with pytest.raises(ValueError, match=message):
        octvideo.predict(network, video, **{"preprocessing": CLIPS, **options})


def test_a_network_without_usable_scores_is_refused(network, video):
    with pytest.raises(
        ValueError, match=r"expected logits \(B, num_classes\) from the network, got \(10, 8, 2, 24, 24\)"
    ):
        octvideo.predict(network.features, video, preprocessing=CLIPS)
    network.head.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match="scores are not finite: its training diverged"):
        octvideo.predict(network, video, preprocessing=CLIPS)


def test_the_package_imports_decoders_and_lightning_when_predict_is_asked_for():
    assert octvideo.predict is prediction.predict
    with pytest.raises(AttributeError, match="module 'octvideo' has no attribute 'forecast'"):
        octvideo.forecast  # noqa: B018
    lines = "import sys, octvideo; print('av' in sys.modules, 'lightning' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
