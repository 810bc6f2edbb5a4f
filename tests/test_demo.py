"""The demo page: what it computes, what it refuses, and what a browser shows of it."""

import base64
import io
import os
import re
import signal
import socket
import sys
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, run_tool, start_tool
from PIL import Image
from test_predict import write_checkpoint
from test_prediction import some

from octvideo.commands import demo
from octvideo.commands import options as command_options
from octvideo.data.motions import write_video
from octvideo.evaluation.feature_maps import Maps, heat, layers_of, maps_of
from octvideo.evaluation.prediction import Predictor
from octvideo.models.checkpoint import load_trained

LABELS = ["<b>run</b>", "sit & wait", "${1 + 1}"]
LIMITS = ["--max-seconds=4", "--max-megabytes=0.2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a small network."""
    return write_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt", LABELS)


@pytest.fixture(scope="module")
def sight(checkpoint):
    """What the page computes with it."""
    predictor = Predictor(load_trained(checkpoint), num_clips=1, num_crops=1, decode_timeout_seconds=2)
    return demo.Sight(predictor, max_seconds=2.5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of 25 frames a second, whose grey level is twice the frame number, by their seconds; and what is none."""
    folder = tmp_path_factory.mktemp("videos")
    for seconds in (0.04, 2, 3, 5):
        levels = (np.arange(round(25 * seconds)) * 2 % 256).astype(np.uint8)
        write_video(
            folder / f"{seconds}.mp4", np.broadcast_to(levels[:, None, None, None], (len(levels), 40, 48, 3)), 25
        )
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    (folder / "large.mp4").write_bytes(bytes(300_000))
    (folder / "torn.mp4").write_bytes((folder / "2.mp4").read_bytes()[:-900])
    return folder


def shown(page):
    """The pictures (H, W, 3) of a page, by what they show."""
    found = re.findall(r'<img class="\w*" src="data:image/png;base64,([^"]*)" alt="([^"]*)"', page)
    return {text: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, text in found}


def test_a_video_has_the_predictors_scores_and_maps_around_a_moment(sight, videos):
    path = str(videos / "2.mp4")
    np.testing.assert_array_equal(sight.predict(path).scores, sight.predictor(path).scores)
    frame, groups = sight.maps(path, 1.0, "res3")
    assert frame.shape == (32, 32, 3)
    assert frame.mean() == pytest.approx(2 * 25, abs=6)  # the 25th frame, or one of its neighbours in the clip
    later, others = sight.maps(path, 1.6, "res3")
    assert later.mean() == pytest.approx(2 * 40, abs=6)
    for found in groups, others:
        assert [(group.kind, group.size) for group in found[0]] == [("high", (2, 4, 4)), ("low", (2, 2, 2))]
    assert not torch.equal(groups[0][0].values, others[0][0].values)
    numbers = 25 + np.array([-8, -4, 0, 4])  # the window of 16 frames around the moment
    clip = torch.tensor(2.0 * numbers).view(1, 4, 1, 1).expand(3, 4, 32, 32)
    trained = sight.predictor.trained
    wanted = maps_of(trained.network, layers_of(trained.network)["res3"], trained.normalize(clip))
    torch.testing.assert_close(groups[0][0].values, wanted[0][0].values, atol=0.05, rtol=0.05)


def test_a_video_of_one_frame_is_shown(sight, videos, tmp_path):
    prediction = sight.predict(str(videos / "0.04.mp4"))
    sight.annotate(prediction, tmp_path / "shown.mp4")
    assert demo.parts().timeline(prediction, 5).count("<rect") == 3
    frame, _ = sight.maps(str(videos / "0.04.mp4"), 0.0, "res2")
    assert frame.max() < 10


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "cannot be shown: Invalid data"),
        ("text.mp4", "cannot be shown: Invalid data"),
        ("torn.mp4", "cannot be shown: "),
        ("3.mp4", "This video runs 0:03.0; the longest one allowed is 0:02.5"),
    ],
)
def test_bad_and_long_videos_are_refused_with_the_reason(sight, videos, name, reason):
    with pytest.raises(demo.RefusedError, match=reason) as caught:
        sight.predict(str(videos / name))
    assert str(videos) not in str(caught.value)  # a visitor need not know where uploads lie


def test_a_decoder_that_hangs_is_killed(sight, videos, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(demo.RefusedError, match="no result within 2 s: the decoder was killed"):
        sight.predict(str(tmp_path / "pipe.mp4"))
    assert sight.predict(str(videos / "2.mp4")).scores.shape == (3,)


def test_a_network_whose_training_diverged_says_so(sight, videos, monkeypatch):
    bias = sight.predictor.trained.network.blocks[-1].proj.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with pytest.raises(demo.RefusedError, match="cannot be shown: the network's scores are not finite"):
        sight.predict(str(videos / "2.mp4"))


def test_maps_of_a_deleted_upload_ask_for_it_again(sight, tmp_path):
    with pytest.raises(demo.RefusedError, match="please drop it again"):
        sight.maps(str(tmp_path / "gone.mp4"), 0.0, "res2")


def test_the_timeline_has_bars_as_high_as_classes_are_probable():
    prediction = some([[0.25, 0.7, 0.05], [0.5, 0.3, 0.2]], [0, 1, 2.4])
    page = demo.parts().timeline(prediction, 5)
    assert re.findall(r"<span>(\w+)</span>", page) == ["jump", "run", "sit"]
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"><title>([^<]*)<', page)
    found = [(*map(float, numbers), text) for *numbers, text in bars]
    assert found[:4] == [
        (0, pytest.approx(0.3), 1, pytest.approx(0.7), "0:00.0 to 0:01.0: 70.0 %"),
        (1, pytest.approx(0.7), pytest.approx(1.4), pytest.approx(0.3), "0:01.0 to 0:02.4: 30.0 %"),
        (0, pytest.approx(0.75), 1, pytest.approx(0.25), "0:00.0 to 0:01.0: 25.0 %"),
        (1, pytest.approx(0.5), pytest.approx(1.4), pytest.approx(0.5), "0:01.0 to 0:02.4: 50.0 %"),
    ]
    assert page.count('viewBox="0 0 2.4 1"') == 3
    assert page.endswith("<span>0:00.0</span><span>0:01.2</span><span>0:02.4</span></div></div>")


def test_the_page_of_maps_has_the_frame_the_means_and_the_strongest_channels():
    frame = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    high, low = torch.randn(2, 12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    groups = [Maps("high", high, (3, 4, 4)), Maps("low", low[:4], (3, 2, 2))]
    page = demo.parts().maps_page(frame, [groups], 1.25, 8)
    pictures = shown(page)
    assert len(pictures) == 1 + 2 + 8 + 4
    np.testing.assert_array_equal(pictures["frame"], frame)
    np.testing.assert_array_equal(pictures["high maps"], heat(high[:, 1].abs().mean(0)))
    np.testing.assert_array_equal(pictures["low maps"], heat(low[:4, 1].abs().mean(0)))
    strongest = groups[0].strongest(8)
    np.testing.assert_array_equal(pictures[f"high channel {strongest[3]}"], heat(high[strongest[3], 1].abs()))
    assert "<b>high</b> 12 of 16 channels, 4 x 4 pixels, 3 frames; " in page
    assert "<b>low</b> 4 of 16 channels, 2 x 2 pixels, 3 frames; " in page
    assert f"<b>high</b> channels {', '.join(map(str, strongest))}" in page
    assert "pathway" not in page
    assert "no low maps" not in page
    assert "Slow pathway" in (both := demo.parts().maps_page(frame, [groups, groups], 1.25, 8))
    assert both.index("Slow pathway") < both.index("Fast pathway")
    assert both.count(demo.parts().LEGEND) == 1


@pytest.mark.parametrize(("kind", "sentence"), [("all", demo.parts().NO_LOW), ("low", demo.parts().NO_HIGH)])
def test_the_page_says_where_there_are_no_low_or_high_maps(kind, sentence):
    maps = Maps(kind, torch.zeros(5, 1, 2, 2), (1, 2, 2))
    page = demo.parts().maps_page(np.zeros((2, 2, 3), np.uint8), [[maps]], 0, 8)
    assert sentence in page
    assert f"<b>{kind}</b> 5 of 5 channels, 2 x 2 pixels, 1 frame; " in page


def test_what_a_visitor_is_told_is_text():
    assert demo.parts().message("") == ""
    assert demo.parts().message("<b>a & b</b>", bad=True) == (
        '<div class="message bad" role="alert">&lt;b&gt;a &amp; b&lt;/b&gt;</div>'
    )
    assert "<b>" not in demo.parts().timeline(replace(some([[0.2, 0.5, 0.3]]), labels=["<b>", "<b>", "<b>"]), 5)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "the following arguments are required: --ckpt"),
        (["--ckpt=a", "--max-seconds=0"], "argument --max-seconds: must be a positive number, got '0'"),
        (["--ckpt=a", "--max-megabytes=nan"], "argument --max-megabytes: must be a positive number, got 'nan'"),
        (["--ckpt=a", "--clips=-1"], "argument --clips: must be a whole number from 1, got '-1'"),
        (["--ckpt=a", "--port=70000"], "--port must be 1 to 65535, got 70000"),
    ],
)
def test_wrong_options_are_one_line(monkeypatch, capsys, options, line):
    monkeypatch.setattr(command_options, "program", "demo.py")
    with pytest.raises(SystemExit, match="2"):
        demo.main(options)
    assert capsys.readouterr().err == f"demo.py: error: {line}\n"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--ckpt=missing.ckpt"], "missing.ckpt"),
        (["--ckpt", ROOT / "README.md"], "README.md is no intact checkpoint"),
        (["--ckpt=missing.ckpt", "--host=no such host"], "--host no such host --port"),
        (["--ckpt=missing.ckpt", "--host=::1"], "--host must be a name or an IPv4 address, got ::1"),
    ],
)
def test_what_cannot_be_opened_is_one_line(options, line):
    finished = run_tool("demo.py", *options, f"--port={free_port()}")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert re.fullmatch(rf"demo\.py: error: .*{re.escape(line)}.*\n", finished.stderr)


def test_a_port_in_use_is_named_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finished = run_tool("demo.py", "--ckpt=missing.ckpt", f"--port={port}")
    assert finished.returncode == 2
    assert finished.stderr == f"demo.py: error: --host 127.0.0.1 --port {port}: Address already in use\n"


def test_without_gradio_the_tool_says_how_to_get_it(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(command_options, "program", "demo.py")
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "NO_PROXY"):
        monkeypatch.setenv(name, "as it was")  # so that it is afterwards
    with pytest.raises(SystemExit, match="2"):
        demo.main([f"--ckpt={checkpoint}", f"--port={free_port()}"])
    assert capsys.readouterr().err == "demo.py: error: the page needs gradio: pip install 'octvideo[demo]'\n"


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """The tool at work: its address, its process, and the folder of what it prints."""
    pytest.importorskip("gradio")
    folder, port = tmp_path_factory.mktemp("demo"), free_port()
    options = [f"--ckpt={checkpoint}", f"--port={port}", "--clips=1", *LIMITS]
    process = start_tool("demo.py", options, folder)
    while not (folder / "stdout").exists() or "Ctrl-C" not in (folder / "stdout").read_text():
        assert not wait([process.sentinel], 0.05), (folder / "stderr").read_text()
    yield f"http://127.0.0.1:{port}", process, folder
    process.kill()
    process.join()


@pytest.fixture
def visit(browser, server):
    """Opens the page in a new session; fails if anything goes wrong in the browser, or comes from elsewhere."""
    told = []

    def open_tab(**options):
        tab = browser.new_page(**options)
        tab.on("console", lambda said: told.append(said.text) if said.type == "error" else None)
        tab.on("pageerror", lambda error: told.append(str(error)))
        tab.on("request", lambda sent: told.append(sent.url) if not sent.url.startswith((server[0], "data:")) else None)
        tab.goto(server[0])
        return tab

    yield open_tab
    assert told == []


def drop(tab, path):
    """Uploads a file, in the place of the former one."""
    tab.locator("input[type=file], button[aria-label=Clear]").first.wait_for(state="attached")
    if not tab.locator("input[type=file]").count():
        tab.get_by_label("Clear").first.click()
    tab.set_input_files("input[type=file]", path)


def likeliest(tab):
    """The class that a page shows in large letters."""
    return tab.locator("[data-testid=label-output-value]").inner_text()


def test_a_clip_that_is_dropped_is_predicted_played_and_looked_into(visit, checkpoint, videos):
    path = videos / "2.mp4"
    wanted = Predictor(load_trained(checkpoint), num_clips=1, num_crops=1)(path).top(3)
    tab = visit(viewport={"width": 390, "height": 800})
    drop(tab, path)
    assert likeliest(tab) == wanted[0].label
    tab.wait_for_function("document.querySelector('video')?.readyState >= 2")
    assert tab.locator(".message").count() == 0
    assert tab.locator(".timeline > span").all_inner_texts() == [best.label for best in wanted]
    assert tab.locator(".maps img").count() == 1 + 2 + 2 * 8
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    for width in (390, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    captions = tab.locator(".maps figcaption")
    assert captions.nth(1).inner_text().startswith("high 24 of 32 channels, 8 x 8 pixels")
    assert captions.nth(2).inner_text().startswith("low 8 of 32 channels, 4 x 4 pixels")
    tab.get_by_label("Layer").click()
    tab.get_by_role("option", name="res5", exact=True).click()
    tab.get_by_text(demo.parts().NO_LOW).wait_for()
    assert captions.nth(1).inner_text().startswith("all 256 of 256 channels, 1 x 1 pixels")
    tab.close()


def test_bad_files_get_a_message_and_the_page_goes_on(visit, videos):
    tab = visit(color_scheme="dark")
    for name, reason in (
        ("text.mp4", "This video cannot be shown: Invalid data found when processing input."),
        ("5.mp4", "This video runs 0:05.0; the longest one allowed is 0:04.0."),
    ):
        drop(tab, videos / name)
        tab.get_by_role("alert").get_by_text(reason).wait_for()
        assert not tab.locator("[data-testid=label-output-value]").is_visible()
    drop(tab, videos / "2.mp4")
    assert likeliest(tab) in LABELS
    assert tab.locator(".message.bad").count() == 0
    tab.close()


def test_a_file_that_is_too_large_is_refused_by_the_page_and_by_the_server(browser, server, videos):
    tab = browser.new_page()
    tab.goto(server[0])
    drop(tab, videos / "large.mp4")
    tab.get_by_text("exceed the maximum allowed size of 204.8 K").wait_for()
    content = {"name": "large.mp4", "mimeType": "video/mp4", "buffer": (videos / "large.mp4").read_bytes()}
    assert tab.request.post(f"{server[0]}/gradio_api/upload", multipart={"files": content}).status == 413
    tab.close()


def test_two_visitors_do_not_mix(visit, videos):
    tabs = [visit(), visit()]
    for tab, seconds in zip(tabs, (2, 3), strict=True):
        drop(tab, videos / f"{seconds}.mp4")
    for tab, seconds in zip(tabs, (2, 3), strict=True):
        caption = tab.locator(".maps figcaption").first
        caption.get_by_text(f"frame at {demo.clock(seconds / 2)}").wait_for()
        tab.locator("input[type=number]").fill("0.5")
        caption.get_by_text("frame at 0:00.5").wait_for()
        assert tab.locator(".timeline .axis span").last.inner_text() == demo.clock(seconds)
        tab.close()


def test_interrupted_the_demo_ends_quietly_and_leaves_nothing(visit, server, videos):
    _, process, folder = server
    tab = visit()
    drop(tab, videos / "2.mp4")
    tab.wait_for_function("document.querySelector('video')?.readyState >= 2")
    played = Path(tab.locator("video").first.get_attribute("src").partition("/file=")[2])
    tab.close()
    uploads = next(path for path in played.parents if path.name.startswith("octvideo_demo_"))
    assert {"2.mp4", "2.predicted.mp4"} <= {path.name for path in uploads.rglob("*.mp4")}
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0
    assert not uploads.exists()
    assert not re.search("Traceback|KeyboardInterrupt", (folder / "stderr").read_text())
