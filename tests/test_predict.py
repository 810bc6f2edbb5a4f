"""octvideo predict: what it takes, what it writes, and how it ends."""

import csv
import dataclasses
import json
import os
import shutil
import stat
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import frame_numbers, run_tool, settle
from PIL import Image
from test_prediction import some

import octvideo
from octvideo.commands import options as command_options
from octvideo.commands import predict
from octvideo.data.motions import write_video
from octvideo.data.video import Video
from octvideo.errors import DecodeError, ListError
from octvideo.evaluation import drawing
from octvideo.evaluation.prediction import Prediction, Timeline
from octvideo.training.recognizer import Recognizer

LABELS = ["run", "jump", "sit"]


def write_checkpoint(path, labels):
    """Writes a checkpoint as train_net.py does, of three classes whose scores differ between videos."""
    torch.manual_seed(0)
    module = Recognizer("i3d_r50", alpha=0.25, num_classes=3, width=8)
    settle(module.network)
    preprocessing = {"clip_frames": 4, "frame_stride": 4, "target_fps": None, "test_crop_size": 32}
    state = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    data = {"labels": labels, "preprocessing": {"sampling": "slowfast", "short_videos": None, **preprocessing}}
    torch.save({**state, "VideoData": data, "pytorch-lightning_version": "2.6.0"}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a small network."""
    return write_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt", LABELS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two good videos of 30 frames at 12.5 a second and a bad one, in two folders, and what is no video."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for name, seed in (("clip10.mp4", 1), ("more/Clip2.mp4", 2)):
        coarse = np.random.default_rng(seed).integers(0, 256, (30, 5, 8, 3), dtype=np.uint8)
        write_video(folder / name, coarse.repeat(8, 1).repeat(8, 2), 25)
    (folder / "more" / "broken.mp4").write_text("no video")
    for name in ("notes.txt", "clip10", ".hidden.mp4", "old.predicted.mp4"):
        (folder / name).write_text("no video either")
    return folder


@pytest.fixture
def run_here(checkpoint, monkeypatch, capsys):
    """Runs the tool in this process, quickly; gives its exit status and what it printed."""

    def run(*options, few=("--clips=1", "--crops=1", "--device=cpu")):
        monkeypatch.setattr(command_options, "program", "predict.py")
        try:
            status = predict.main([*map(str, options), f"--ckpt={checkpoint}", *few])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def facts(path):
    """Frames (T, H, W, 3), their moments, frame rate, seconds and format of a file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        seconds = [round(float(frame.pts * stream.time_base), 3) for frame in frames]
        kind = stream.codec_context.name, stream.codec_context.pix_fmt
        return images, seconds, float(stream.average_rate), float(stream.duration * stream.time_base), kind


def bar(image):
    """How far the bar of an annotated frame is green, as a share of its width."""
    height, width = image.shape[:2]
    strip = drawing.strip(width, height, "", 0)
    top = height - max(1, strip.height // 6)
    row = image[top + 1 :].astype(int).mean(0)
    return float((row[:, 1] > row[:, 0] + 60).mean())


def test_a_folder_with_a_bad_video_is_predicted_and_written_down(videos, checkpoint, tmp_path):
    """As a user runs it, with every option that writes."""
    out = tmp_path / "out"
    finished = run_tool(
        *("predict.py", videos, "--ckpt", checkpoint, "--json", out / "a.json", "--csv", out / "a.csv", "--timeline"),
        *("--save-video", out / "videos", "--thumbnail", out / "sheets", "--clips=2", "--device=cpu", "--top=2"),
        "--backend=pyav",  # decord would say something about the bad one
    )
    assert finished.returncode == 1, finished.stderr
    assert finished.stderr == ""  # no bar where there is no terminal
    good, broken = [str(videos / name) for name in ("clip10.mp4", "more/Clip2.mp4")], str(videos / "more/broken.mp4")
    assert "2 videos predicted, 1 bad" in finished.stdout
    assert finished.stdout.endswith(f"annotated copies: {out / 'videos'}\ncontact sheets: {out / 'sheets'}\n")
    assert f"  {broken}: Invalid data found when processing input\n" in finished.stdout
    wanted = [octvideo.predict(checkpoint, path, num_clips=2, device="cpu") for path in good]

    found = json.loads((out / "a.json").read_text())
    assert list(found) == ["checkpoint", "network", "alpha", "labels", "videos", "bad"]
    assert (found["checkpoint"], found["network"], found["alpha"]) == (str(checkpoint), "i3d_r50", 0.25)
    assert found["labels"] == LABELS
    assert found["bad"] == [{"path": broken, "reason": "Invalid data found when processing input"}]
    assert [video["path"] for video in found["videos"]] == good
    for video, name, prediction in zip(found["videos"], ("clip10", "Clip2"), wanted, strict=True):
        assert (video["status"], video["seconds"]) == ("ok", pytest.approx(1.2))
        np.testing.assert_allclose(video["scores"], prediction.scores, atol=1e-6)
        assert [(one["label"], one["class"]) for one in video["predictions"]] == [one[:2] for one in prediction.top(2)]
        assert video["predictions"][0]["probability"] == max(video["scores"])
        np.testing.assert_allclose(video["timeline"]["scores"], prediction.timeline.scores, atol=1e-6)
        assert video["timeline"]["seconds"] == [pytest.approx(0.6)]
        (segment,) = video["segments"]
        assert (segment["start"], segment["end"]) == (0, pytest.approx(1.2))
        assert segment["mean_score"] == pytest.approx(prediction.timeline.scores[0].max())
        assert f"{segment['label']}" in finished.stdout
        assert video["annotated"] == str(out / "videos" / f"{name}.predicted.mp4")
        assert len(facts(video["annotated"])[0]) == 30
        assert video["thumbnail"] == str(out / "sheets" / f"{name}.predicted.jpg")
        assert Image.open(video["thumbnail"]).format == "JPEG"

    with open(out / "a.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "status", "reason", "rank", "label", "probability"]
    assert [row[:2] + row[3:4] for row in rows] == [
        *([good[0], "ok", "1"], [good[0], "ok", "2"], [broken, "bad", ""], [good[1], "ok", "1"], [good[1], "ok", "2"]),
    ]
    assert rows[2][2] == "Invalid data found when processing input"
    assert float(rows[0][5]) == pytest.approx(wanted[0].top(1)[0].probability, abs=1e-6)
    assert sorted(os.listdir(out)) == ["a.csv", "a.json", "sheets", "videos"]
    assert sorted(os.listdir(out / "videos")) == ["Clip2.predicted.mp4", "clip10.predicted.mp4"]


def test_scores_and_bad_videos_are_those_of_test_net(videos, checkpoint, tmp_path):
    names = ("clip10.mp4", "more/Clip2.mp4", "more/broken.mp4")
    (tmp_path / "test.csv").write_text("".join(f"{name} {k}\n" for k, name in enumerate(names)))
    common = [f"--ckpt={checkpoint}"]
    tested = run_tool(
        *("test_net.py", *common, f"--data.test_list={tmp_path / 'test.csv'}", f"--data.root={videos}"),
        *("--data.num_workers=0", "--data.clip_frames=4", "--data.frame_stride=4", "--data.target_fps=null"),
        *("--data.test_crop_size=32", "--model.name=i3d_r50", "--trainer.accelerator=cpu", f"--output={tmp_path}"),
    )
    assert tested.returncode == 0, tested.stderr
    predicted = run_tool("predict.py", *common, tmp_path / "test.csv", "--root", videos, "--json", tmp_path / "p.json")
    assert predicted.returncode == 1
    wanted = json.loads((tmp_path / "predictions.json").read_text())
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["bad"] == wanted["bad"]
    assert found["accuracy"] == {"top1": wanted["top1"], "top5": 1, "videos": 2}
    for one, other in zip(found["videos"], wanted["videos"], strict=True):
        assert (one["path"], one["truth"]["class"]) == (other["path"], other["label"])
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)


def test_lists_have_class_numbers_or_not_and_their_paths_a_root(run_here, videos, tmp_path):
    shutil.copy(videos / "clip10.mp4", tmp_path / "a b.mp4")
    (tmp_path / "list.csv").write_text(
        f"\ufeffpath,label\n{videos}/clip10.mp4 1\n{videos}/more/Clip2.mp4\n\na b.mp4, 2\r\n", encoding="utf-8"
    )
    sources = [(str(videos / "clip10.mp4"), 1), (str(videos / "more" / "Clip2.mp4"), None)]
    assert predict.find_videos([tmp_path / "list.csv"], None, 3) == [*sources, (str(tmp_path / "a b.mp4"), 2)]
    assert predict.find_videos([tmp_path / "list.csv"], Path("r"), 3) == [*sources, ("r/a b.mp4", 2)]
    status, printed, _ = run_here(tmp_path / "list.csv", "--json", tmp_path / "a.json")
    assert status == 0
    found = json.loads((tmp_path / "a.json").read_text())
    one, two, three = found["videos"]
    assert (one["truth"], three["truth"]) == ({"label": "jump", "class": 1}, {"label": "sit", "class": 2})
    assert "truth" not in two
    right = sum(video["predictions"][0]["class"] == video["truth"]["class"] for video in (one, three))
    assert found["accuracy"] == {"top1": right / 2, "top5": 1, "videos": 2}
    assert f"top-1 {50 * right:.2f} %, top-5 100.00 % of 2 videos with a given class" in printed


def test_accuracies_count_good_videos_with_a_class():
    scores = np.eye(7, dtype=np.float32)[:2] + np.linspace(0, 0.1, 7, dtype=np.float32)[::-1]
    predictions = [Prediction("", row, [*"abcdefg"], None) for row in scores]
    outcomes = [
        predict.Outcome("", truth, prediction, "", {})
        for truth, prediction in ((0, predictions[0]), (0, predictions[1]), (6, predictions[0]), (None, predictions[0]))
    ]
    bad = predict.Outcome("", 0, None, "broken", {})
    assert predict.accuracies([*outcomes, bad]) == {
        "top1": pytest.approx(1 / 3),
        "top5": pytest.approx(2 / 3),
        "videos": 3,
    }
    assert predict.accuracies([bad, outcomes[3]]) is None


def test_folders_are_searched_in_natural_order_and_once(tmp_path):
    for name in ("b/clip10.mp4", "b/clip9.mp4", "a2/x.avi", "a10/x.avi", ".git/x.mp4", "B/clip1.MKV", "a2/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a2" / "up").symlink_to(tmp_path)
    found = [os.path.relpath(path, tmp_path) for path in predict.search(tmp_path)]
    assert found == ["a2/x.avi", "a10/x.avi", "B/clip1.MKV", "b/clip9.mp4", "b/clip10.mp4"]
    with pytest.raises(ListError, match="nothing: No such file or directory"):
        predict.search(tmp_path / "nothing")


def test_the_bar_follows_the_timeline_and_the_rest_of_the_picture_stays(tmp_path):
    frames = np.full((75, 90, 121, 3), 200, np.uint8)  # of odd width
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 90, 121, "yuvj420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    scores = np.array([[0.75, 0.25, 0], [0.1, 0.4, 0.5], [0, 1, 0]], np.float32)
    prediction = Prediction(str(tmp_path / "a.avi"), scores.mean(0), LABELS, Timeline(np.arange(4.0), scores))
    drawing.annotate((prediction, tmp_path / "out"))
    images, seconds, rate, duration, kind = facts(tmp_path / "out")
    assert images.shape == (75, 90, 122, 3)
    assert kind == ("h264", "yuv420p")
    assert (rate, duration, seconds[:3]) == (25, 3, [0, 0.04, 0.08])
    for start, share in ((0, 0.75), (25, 0.5), (50, 1)):
        for image in images[start : start + 25]:
            assert bar(image) == pytest.approx(share, abs=0.03)
    strip = drawing.strip(122, 90, "jump", 1).height
    assert np.abs(images[:, : -strip - 1].astype(int) - 200).max() < 4
    texts = images[:, -strip : -strip // 6 - 2].astype(int)
    assert np.abs(texts[10] - texts[20]).max() < 40
    assert np.abs(texts[10] - texts[60]).max() > 100  # another class is named


def test_annotated_videos_keep_the_moments_of_a_variable_rate(tmp_path):
    moments = [0, 40, 80, 500, 540, 1500, 1540, 2600]  # milliseconds
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = moment + 700, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    drawing.annotate((dataclasses.replace(some([[1, 0, 0]]), path=str(tmp_path / "a.mkv")), tmp_path / "out"))
    images, seconds, _, duration, _ = facts(tmp_path / "out")
    assert seconds == [moment / 1000 for moment in moments]
    assert frame_numbers(images[:, :20]) == list(range(8))
    assert duration == pytest.approx(2.64, abs=0.001)


def test_annotated_videos_and_contact_sheets_are_upright(run_here, real_videos, tmp_path):
    odd = [real_videos / "odd" / name for name in ("video_90.mov", "video_0.mov", "gif-transparent.gif")]
    status, _, printed = run_here(*odd, "--save-video", tmp_path, "--thumbnail", tmp_path)
    assert (status, printed) == (0, "")
    turned, plain, tiny = (facts(tmp_path / f"{path.stem}.predicted.mp4")[0] for path in odd)
    assert (turned.shape, plain.shape) == ((3, 568, 320, 3), (3, 320, 568, 3))
    assert tiny.shape == (1, 2, 2, 3)
    seen = turned[0, ::8, ::8].astype(float).ravel()
    with Video(odd[0]) as video:
        wanted = video.frames_at([0])[0, ::8, ::8].astype(float).ravel()
    assert np.corrcoef(seen[:-6000], wanted[:-6000])[0, 1] > 0.98
    assert Image.open(tmp_path / "video_90.predicted.jpg").size == (780, 780)  # frames of 180 x 320


def test_real_videos_are_predicted_like_anywhere(run_here, real_videos, tmp_path):
    status, printed, _ = run_here(real_videos / "odd", "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert status == 1
    assert {Path(one["path"]).name for one in found["bad"]} >= {"corrupted.mp4", "empty.mp4", "opus_audioinit.mp4"}
    assert {Path(one["path"]).name for one in found["videos"]} >= {"unordered.mov", "tiny_av1.mp4", "nasa_13013.mp4"}
    assert f"{len(found['videos'])} videos predicted, {len(found['bad'])} bad" in printed
    assert len(found["videos"]) + len(found["bad"]) == len(list((real_videos / "odd").iterdir()))


def test_a_contact_sheet_shows_eight_moments(numbered_video):
    times, frames = drawing.read_stills((str(numbered_video), "auto"))
    np.testing.assert_allclose(times, (np.arange(8) + 0.5) / 4)
    np.testing.assert_allclose(frames.mean((1, 2, 3)) / 4, [3, 11, 18, 26, 33, 41, 48, 56], atol=0.6)
    sheet = np.asarray(drawing.contact_sheet(some([[0.2, 0.7, 0.1]]), times, frames))
    height, width = frames.shape[1:3]
    assert (height, width) == (180, 240)
    for place, frame in enumerate(frames):
        top, left = 50 + place // 4 * (height + 40), 12 + place % 4 * (width + 12)
        np.testing.assert_array_equal(sheet[top : top + height, left : left + width], frame)
        assert sheet[top + height : top + height + 30, left : left + 60].max() > 200  # its time
    assert sheet[:40].max() > 200
    assert [drawing.clock(seconds) for seconds in (0.04, 59.96, 61.5, 3600)] == [
        "0:00.0",
        "1:00.0",
        "1:01.5",
        "60:00.0",
    ]


def test_a_long_class_name_is_cut_and_its_probability_is_not():
    short, cut = (np.asarray(drawing.strip(200, 200, name, 0.5)) for name in ("jump", "jumping over a " * 9))
    assert (short[:, 170:] == cut[:, 170:]).all()
    assert (cut[: -(len(cut) // 6), 100:150] > 0).any()
    assert not (short[: -(len(short) // 6), 100:150] > 0).any()


def test_files_of_videos_with_one_name_have_names_of_their_own():
    paths = ["x/a.mp4", "y/a.avi", "y/A.mp4", "a_2.mp4", "b.mp4"]
    names = predict.file_names(paths, (None, None))
    assert names == ["a", "a_2", "A_3", "a_2_2", "b"]
    assert len({name.lower() for name in names}) == 5


def test_sources_are_never_written_over(run_here, videos, tmp_path):
    for name in ("a.mp4", "a.predicted.mp4", "sub/a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(videos / "clip10.mp4", tmp_path / name)
    content = (videos / "clip10.mp4").read_bytes()
    inputs = [tmp_path / name for name in ("a.mp4", "a.predicted.mp4", "sub/a.mp4")]
    status, _, _ = run_here(*inputs, "--save-video", tmp_path, "--json", tmp_path / "a.json")
    assert status == 0
    assert [path.read_bytes() for path in inputs] == [content] * 3
    found = json.loads((tmp_path / "a.json").read_text())
    written = [os.path.basename(video["annotated"]) for video in found["videos"]]
    assert written == ["a_2.predicted.mp4", "a.predicted.predicted.mp4", "a_3.predicted.mp4"]
    assert set(os.listdir(tmp_path)) == {"a.mp4", "a.predicted.mp4", "sub", "a.json", *written}


def test_an_annotated_copy_may_have_a_time_limit(videos, tmp_path):
    prediction = dataclasses.replace(some([[1, 0, 0]]), path=str(videos / "clip10.mp4"))
    drawing.annotate((prediction, tmp_path / "a.mp4"), most_seconds=60)
    with pytest.raises(DecodeError, match="it takes too long to write"):
        drawing.annotate((prediction, tmp_path / "a.mp4"), most_seconds=0)


def test_a_video_that_breaks_while_it_is_annotated_is_bad(run_here, videos, tmp_path, monkeypatch):
    def no_frames(container, stream, step):
        return iter(())

    monkeypatch.setattr(drawing, "decode_all", no_frames)
    status, printed, _ = run_here(videos / "clip10.mp4", "--save-video", tmp_path / "out")
    assert status == 1
    assert f"{videos / 'clip10.mp4'}: no frame could be decoded" in printed

    def hangs(container, stream, step):
        os.mkfifo(tmp_path / "pipe")
        return open(tmp_path / "pipe")

    monkeypatch.setattr(drawing, "decode_all", hangs)
    status, printed, _ = run_here(
        videos / "clip10.mp4", "--save-video", tmp_path / "out", "--decode_timeout_seconds", 2
    )
    assert status == 1
    assert f"{videos / 'clip10.mp4'}: no result within 2 s: the decoder was killed" in printed
    assert os.listdir(tmp_path / "out") == []


def test_broken_data_is_the_videos_fault_and_a_full_disk_is_not(videos, tmp_path):
    content = (videos / "clip10.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) // 2])
    prediction = dataclasses.replace(some([[1, 0, 0]]), path=str(tmp_path / "a.mp4"))
    with pytest.raises(DecodeError, match=r"a\.mp4: cannot be annotated: Invalid data"):
        drawing.annotate((prediction, tmp_path / "out"))
    prediction = dataclasses.replace(prediction, path=str(videos / "clip10.mp4"))
    with pytest.raises(OSError, match="No space left on device"):
        drawing.annotate((prediction, Path("/dev/full")))


def test_a_decoder_that_hangs_is_a_bad_video(run_here, videos, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    status, printed, _ = run_here(tmp_path / "pipe.mp4", videos / "clip10.mp4", "--decode_timeout_seconds=2")
    assert status == 1
    assert "1 videos predicted, 1 bad" in printed
    assert f"{tmp_path / 'pipe.mp4'}: no result within 2 s: the decoder was killed" in printed


def test_names_of_no_encoding_come_through(run_here, videos, tmp_path):
    path = os.fsencode(tmp_path) + b"/[\xff].mp4"
    shutil.copy(os.fsencode(videos / "clip10.mp4"), path)
    status, printed, _ = run_here(tmp_path, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    assert status == 0
    assert "[\\udcff].mp4" in printed
    assert json.loads((tmp_path / "a.json").read_text())["videos"][0]["path"] == os.fsdecode(path)
    assert path in (tmp_path / "a.csv").read_bytes()


def test_the_network_is_compiled_as_the_option_says(run_here, videos, monkeypatch):
    asked = []
    monkeypatch.setattr(predict, "compile_network", lambda network, how: asked.append(how))
    for options in ([], ["--compile=blocks"], ["--compile=true"]):
        assert run_here(videos / "clip10.mp4", *options)[0] == 0
    assert asked == [None, "blocks", "true"]


def test_other_alphas_and_top_classes(run_here, videos, tmp_path):
    for alpha in (0, 0.5):
        options = ["--alpha", alpha, "--top", 9, "--json", tmp_path / f"{alpha}.json"]
        assert run_here(videos / "clip10.mp4", *options)[0] == 0
    one, two = (json.loads((tmp_path / f"{alpha}.json").read_text()) for alpha in (0, 0.5))
    assert (one["alpha"], two["alpha"]) == (0, 0.5)
    assert len(one["videos"][0]["predictions"]) == 3
    assert np.abs(np.subtract(one["videos"][0]["scores"], two["videos"][0]["scores"])).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: VIDEO|FOLDER|LIST"),
        (["missing.mp4"], "no videos found in missing.mp4: none of the 1 files named exist, such as missing"),
        (["{folder}"], "no videos found in {folder}"),
        (["{folder}/missing.csv"], "{folder}/missing.csv: No such file or directory"),
        (["{folder}/wrong.txt"], "{folder}/wrong.txt:2: class number must be 0 to 2, got 3"),
        (["{folder}/negative.txt"], "{folder}/negative.txt:1: class number must be 0 to 2, got -1"),
        (["{folder}/binary.txt"], "{folder}/binary.txt: not a text file in UTF-8"),
        (["{video}", "--clips=0"], "argument --clips: must be a whole number from 1, got '0'"),
        (["{video}", "--top=two"], "argument --top: must be a whole number from 1, got 'two'"),
        (["{video}", "--decode_timeout_seconds=0"], "must be a positive number or null, got '0'"),
        (["{video}", "--decode_timeout_seconds=long"], "must be a positive number or null, got 'long'"),
        (["{video}", "--device=abacus"], "--device abacus: "),
        (["{video}", "--alpha=2"], "alpha"),
        (["{video}", "--backend=gif"], "argument --backend: invalid choice: 'gif'"),
        (["{video}", "--json={folder}"], "--json {folder}: that is a folder"),
        (["{video}", "--csv={video}"], "--csv {video}: that is an input or another result"),
        (["{video}", "--json=a", "--csv=a"], "--csv a: that is an input or another result"),
        (["{video}", "--save-video={folder}/wrong.txt"], "File exists: '{folder}/wrong.txt'"),
        (["{video}", "--ckpt=missing.ckpt"], "No such file or directory: 'missing.ckpt'"),
        (["{video}", "--ckpt={video}"], "clip10.mp4"),
    ],
)
def test_mistakes_in_the_command_are_one_line_each(run_here, videos, tmp_path, options, message):
    (tmp_path / "wrong.txt").write_text("a.mp4 0\nb.mp4 3\n")
    (tmp_path / "negative.txt").write_text("a.mp4 -1\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00")
    names = {"folder": str(tmp_path), "video": str(videos / "clip10.mp4")}
    options = [option.format(**names) for option in options]
    # Here the last --ckpt counts, which is the fixture's.
    own = [option for option in options if option.startswith("--ckpt")]
    status, printed, error = run_here(*options, few=own)
    assert (status, printed) == (2, ""), error
    assert error.startswith("predict.py: error: ")
    assert message.format(**names) in error
    assert error.count("\n") == 1


def test_an_interrupted_run_ends_with_130(run_here, videos, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "Predictor", interrupt)
    status, printed, error = run_here(videos, few=())
    assert (status, printed) == (130, "")
    assert error.startswith("stopped")


@pytest.mark.parametrize("typed", ["https://example.org/a.mp4", "rtsp://camera", "s3://bucket/list.csv", "-"])
def test_an_address_is_refused_as_it_was_typed(run_here, videos, tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    end = f" must be a file or folder of this machine, got '{typed}'\n"
    status, _, error = run_here(videos / "clip10.mp4", "--json", typed)
    assert (status, error) == (2, f"predict.py: error: argument --json:{end}")
    assert not os.listdir(tmp_path)


def test_addresses_in_a_list_and_pictures_are_bad_videos_with_the_reason(run_here, videos, tmp_path):
    Image.new("RGB", (32, 24)).save(tmp_path / "a.jpg")
    (tmp_path / "list.txt").write_text(f"rtsp://example.org/a.mp4 1\n{videos / 'clip10.mp4'} 0\n")
    status, printed, _ = run_here(tmp_path / "list.txt", tmp_path / "a.jpg", "--root", videos)
    assert status == 1
    assert "  rtsp://example.org/a.mp4: no kind of store is called rtsp://\n" in printed
    assert f"  {tmp_path / 'a.jpg'}: a still image, not a video\n" in printed


def test_a_folder_of_frames_is_a_video(run_here, tmp_path):
    for number in (9, 10, 11):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / f"f{number}.png")
    status, printed, _ = run_here(
        tmp_path, "--frames-fps", "3", "--json", tmp_path / "found.json", "--save-video", tmp_path
    )
    assert (status, "1 videos predicted, 0 bad" in printed) == (0, True)
    (found,) = json.loads((tmp_path / "found.json").read_text())["videos"]
    assert (found["path"], found["seconds"]) == (str(tmp_path), 1)
    with Video(found["annotated"]) as copy:
        assert (copy.fps, copy.num_frames, copy.frames_at([0]).shape) == (3, 3, (1, 48, 64, 3))
    (tmp_path / "f10.png").unlink()
    (tmp_path / "f12.png").touch()
    status, printed, _ = run_here(tmp_path)
    assert (status, f"{tmp_path}: frames are missing after f9.png" in printed) == (1, True)


def test_results_go_through_links_and_into_pipes(run_here, videos, tmp_path):
    for name in ("results.json", "old.mp4", "old.jpg"):
        (tmp_path / name).write_text("old")
    (tmp_path / "out").mkdir()
    links = {"json": "results.json", "out/clip10.predicted.mp4": "../old.mp4", "out/clip10.predicted.jpg": "../old.jpg"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    os.mkfifo(tmp_path / "csv")
    reader = os.open(tmp_path / "csv", os.O_RDONLY | os.O_NONBLOCK)
    files = ("--json", tmp_path / "json", "--csv", tmp_path / "csv")
    folders = ("--save-video", tmp_path / "out", "--thumbnail", tmp_path / "out")
    assert run_here(videos / "clip10.mp4", *files, *folders)[0] == 0
    assert {link: os.readlink(tmp_path / link) for link in links} == links
    assert json.loads((tmp_path / "results.json").read_text())["videos"][0]["status"] == "ok"
    assert os.read(reader, 1000).startswith(b"path,status,reason,")
    os.close(reader)
    assert len(facts(tmp_path / "old.mp4")[0]) == 30
    assert Image.open(tmp_path / "old.jpg").format == "JPEG"


def test_all_results_may_go_to_one_device(run_here, videos, tmp_path):
    null = tmp_path / "null"  # one of our own, for a mistake here may replace it
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        null.open("wb").close()
    except OSError:
        pytest.skip("no device can be made here")
    assert run_here(videos / "clip10.mp4", "--json", null, "--csv", null)[0] == 0
    assert null.is_char_device()
