"""A page that shows what a checkpoint of train_net.py sees in a video that is dropped on it.

python tools/demo.py --ckpt CHECKPOINT [--alpha A] [--port 7860] [--max-megabytes 100] [--max-seconds 60]

The page shows
  the video, upright, in a form that every browser plays, with the most likely class of the present second drawn in
  the five most likely classes, as the average of --clips moments and --crops crops
  their probabilities second by second, each of one clip around the middle of that second
  the maps that a layer gives for a clip around a chosen moment: high and low ones side by side, as their mean magnitude
  and the channels that are the strongest there

It needs gradio, pip install 'octvideo[demo]', and no network: the page and the server load nothing from elsewhere. By
default only this machine can open it; --host 0.0.0.0 lets in whoever reaches it, without a password and without a limit
to how many files they upload: that is for networks that you trust. Visitors are served one after the other. What they
upload lies in a temporary folder and is deleted after an hour, or when the demo ends.

Exit status: 0 if it was stopped by Ctrl-C or SIGTERM; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from octvideo.commands.options import Parser, fail, one_line_errors
from octvideo.data.video import Video
from octvideo.data.watchdog import HungError
from octvideo.evaluation.drawing import annotate, clock
from octvideo.evaluation.feature_maps import Maps, heat, layers_of, maps_of
from octvideo.evaluation.prediction import Prediction, Predictor, clips_around
from octvideo.evaluation.report import say_alpha
from octvideo.models.checkpoint import load_trained

TOP = 5  # classes to show
STRONGEST = 8  # channels to show
KEPT_SECONDS = 3600  # uploads
CLEANING_SECONDS = 600  # between two looks for old uploads
WAITING = 20  # visitors that may wait for their turn
WRITING_SECONDS = 120.0  # that the player's video may take: a header may say that hours of frames are one second
CSS = """
.gradio-container { max-width: 1280px !important; }
#said:not(:has(.message)) { display: none; }
.message { padding: 10px 14px; border-radius: 6px; border: 1px solid var(--border-color-primary); }
.message.bad { border-color: #c0392b; border-left-width: 6px; }
#player video { max-height: 420px; }
.timeline { display: grid; grid-template-columns: minmax(0, 10em) 1fr; gap: 6px 10px; font-size: 13px; }
.timeline p { grid-column: 1 / -1; margin: 0; }
.timeline svg { display: block; width: 100%; height: 28px; background: var(--background-fill-secondary); }
.timeline rect { fill: var(--color-accent); }
.timeline span { align-self: center; overflow-wrap: anywhere; }
.timeline .axis { grid-column: 2; display: flex; justify-content: space-between; }
.maps { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; margin-bottom: 12px; }
.maps figure { margin: 0; min-width: 0; }
.maps figcaption { font-size: 12px; line-height: 1.4; margin-top: 4px; overflow-wrap: anywhere; }
.maps p { font-size: 13px; margin: 0; }
.maps img { display: block; width: 100%; margin: 0; border-radius: 3px; }
.maps img.cells { image-rendering: pixelated; }
.channels { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 3px; }
@media (max-width: 640px) {
  .timeline { grid-template-columns: 1fr; gap: 2px; }
  .timeline .axis { grid-column: 1; }
  .maps { gap: 6px; }
  .maps.small { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .maps.small p { grid-column: 1 / -1; }
  .maps.small p:empty { display: none; }
  .maps figcaption { font-size: 11px; }
}
"""
TIMELINE = "Timeline: the probability of each class in one clip around the middle of each second"
LEGEND = (
    "Above: the mean magnitude of the channels, in the middle frame of the clip. Here: the channels that are the "
    "strongest there. Each picture has its smallest value darkest and its largest one lightest."
)
NO_LOW = "This layer has no low maps: all of its channels are at full resolution, as with alpha 0."
NO_HIGH = "This layer has no high maps: all of its channels are at half the resolution, as with alpha 1."
Result = TypeVar("Result")


class RefusedError(ValueError):
    """A video that the page does not take; the message says why."""


class Desk:
    """Does what other threads ask for in the thread that calls `work`, one job after the other.

    A network with hooks in it and a decoding process serve one caller at a time; and a decoding process dies with the
    thread that started it, which those of a web server do as soon as nobody asks them anything.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self._closed = False

    def ask(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The function's result, or the error that it raises; a CancelledError when the desk is closed."""
        answer: Future[Result] = Future()
        self._jobs.put((answer, function, arguments))
        if self._closed:  # perhaps before this job was there
            answer.cancel()
        return answer.result()

    def work(self) -> NoReturn:
        """Does jobs until it is interrupted; nobody waits any longer then."""
        try:
            while True:
                answer, function, arguments = self._jobs.get()
                try:
                    if not answer.cancelled():
                        answer.set_result(function(*arguments))
                except BaseException as error:  # it is raised again where it was asked for
                    answer.set_exception(error)
                    if not isinstance(error, Exception):
                        raise
        finally:
            self._closed = True
            while not self._jobs.empty():
                self._jobs.get()[0].cancel()


class Sight:
    """What a network sees in videos.

    Args:
        predictor: it, and how videos become its clips.
        max_seconds: of a video.
    """

    def __init__(self, predictor: Predictor, max_seconds: float) -> None:
        self.predictor = predictor
        self.max_seconds = max_seconds
        self.layers = layers_of(predictor.trained.network)
        self._duration = predictor.watched(self._read_duration)
        self._clip = predictor.watched(self._read_clip)
        self._annotate = predictor.watched(partial(annotate, most_seconds=WRITING_SECONDS))

    def _read_duration(self, path: str) -> float:
        with Video(path, self.predictor.backend) as video:
            return video.duration_seconds

    def _read_clip(self, moment: tuple[str, float]) -> NDArray[np.uint8]:
        """The clip (C, T, H, W) of the centre around a moment of a video, in seconds."""
        path, seconds = moment
        with Video(path, self.predictor.backend) as video:
            return clips_around(video, [seconds], self.predictor.trained.preprocessing)[0]

    def predict(self, path: str) -> Prediction:
        """Predicts a video that is not too long.

        Raises:
            RefusedError: it is too long, broken, or no video; the network gives no numbers.
        """
        seconds = self._reading(self._duration, path)
        if seconds > self.max_seconds:
            raise RefusedError(
                f"This video runs {clock(seconds)}; the longest one allowed is {clock(self.max_seconds)}."
            )
        return self._reading(self.predictor, path)

    def annotate(self, prediction: Prediction, output: Path) -> None:
        """Writes the video again, as H.264 in MP4, with its timeline drawn in.

        Raises:
            RefusedError: it is broken somewhere, or the disk is full.
        """
        self._reading(self._annotate, (prediction, output))

    def maps(self, path: str, seconds: float, layer: str) -> tuple[NDArray[np.uint8], list[list[Maps]]]:
        """The middle frame (H, W, 3) of the clip around a moment, and a layer's maps for that clip by pathways.

        Args:
            path: the video.
            seconds: the moment.
            layer: one of `layers`.

        Raises:
            RefusedError: the video is gone or broken.
        """
        if not os.path.exists(path):
            raise RefusedError("The video is no longer here; please drop it again.")
        clip = self._reading(self._clip, (path, seconds))
        trained, device = self.predictor.trained, self.predictor.device
        pixels = torch.from_numpy(clip).to(device)
        maps = maps_of(trained.network, self.layers[layer], trained.normalize(pixels))
        return clip[:, clip.shape[1] // 2].transpose(1, 2, 0), maps

    def _reading(self, read: Callable[[Any], Result], job: Any) -> Result:
        try:
            return read(job)
        except (HungError, ValueError, OSError) as error:  # a DecodeError's reason says nothing of where uploads lie
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise RefusedError(f"This video cannot be shown: {reason}.") from error


def message(text: str, bad: bool = False) -> str:
    """HTML that says something to the visitor; nothing for no text."""
    kind, role = ("message bad", "alert") if bad else ("message", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>' if text else ""


def timeline(prediction: Prediction) -> str:
    """HTML with a row for each of the most likely classes: bars as wide as a second and as high as it is probable."""
    edges, scores = prediction.timeline.edges_seconds.tolist(), prediction.timeline.scores.tolist()
    rows = []
    for best in prediction.top(TOP):
        bars = [
            f'<rect x="{start}" y="{1 - of_second[best.number]:.4f}" width="{end - start}" '
            f'height="{of_second[best.number]:.4f}"><title>{clock(start)} to {clock(end)}: '
            f"{100 * of_second[best.number]:.1f} %</title></rect>"
            for start, end, of_second in zip(edges[:-1], edges[1:], scores, strict=True)
        ]
        label = html.escape(best.label)
        rows.append(
            f'<span>{label}</span><svg viewBox="0 0 {edges[-1]} 1" preserveAspectRatio="none" role="img" '
            f'aria-label="probability of {label} over time">{"".join(bars)}</svg>'
        )
    times = "".join(f"<span>{clock(share * edges[-1])}</span>" for share in (0, 0.5, 1))
    return f'<div class="timeline"><p>{TIMELINE}</p>{"".join(rows)}<div class="axis">{times}</div></div>'


def picture(pixels: NDArray[np.uint8], text: str, kind: str = "") -> str:
    """HTML of a picture (H, W, 3) that holds it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{html.escape(text)}" title="{html.escape(text)}">'
    )


def figure(content: str, caption: str) -> str:
    """HTML of pictures above a caption."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def maps_page(frame: NDArray[np.uint8], pathways: list[list[Maps]], seconds: float) -> str:
    """HTML of a frame (H, W, 3) beside the maps that a layer gives for it, and below them single channels.

    Args:
        frame: of the clip.
        pathways: as `maps_of` gives them.
        seconds: when the frame is shown.
    """
    parts = []
    for number, groups in enumerate(pathways):
        total = sum(len(group.values) for group in groups)
        means = [figure(picture(frame, "frame"), f"<b>frame</b> at {clock(seconds)}")]
        strongest = [f"<p>{LEGEND if number == 0 else ''}</p>"]
        for group in groups:
            magnitudes, channels = group.magnitudes(), group.strongest(STRONGEST)
            mean, (frames, height, width) = magnitudes.mean(0), group.size
            text = (
                f"<b>{group.kind}</b> {len(group.values)} of {total} channels, {height} x {width} cells, "
                f"{frames} frame{'s' * (frames > 1)}; {mean.min():.2g} to {mean.max():.2g}"
            )
            means.append(figure(picture(heat(mean), f"{group.kind} maps", "cells"), text))
            grid = "".join(picture(heat(magnitudes[one]), f"{group.kind} channel {one}", "cells") for one in channels)
            text = f"<b>{group.kind}</b> channels {', '.join(map(str, channels))}"
            strongest.append(figure(f'<div class="channels">{grid}</div>', text))
        if len(groups) == 1:
            means.append(f"<p>{NO_HIGH if groups[0].kind == 'low' else NO_LOW}</p>")
        parts += [f"<h3>{('Slow', 'Fast')[number]} pathway</h3>"] if len(pathways) > 1 else []
        parts += [f'<div class="maps">{"".join(means)}</div>', f'<div class="maps small">{"".join(strongest)}</div>']
    return "".join(parts)


def build(sight: Sight, desk: Desk, *, name: str, max_megabytes: float) -> Any:
    """The page, as gradio's Blocks.

    Args:
        sight: what computes, for one caller at a time.
        desk: where it does.
        name: of the checkpoint.
        max_megabytes: that an upload may have, to be said.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    import gradio as gr

    trained = sight.predictor.trained
    side, frames = trained.preprocessing.test_crop_size, trained.preprocessing.clip_frames

    def begin(text: str = "") -> tuple[Any, ...]:
        return message(text), gr.Column(visible="hidden"), None, None, ""

    def look(path: str) -> dict[Any, Any]:
        try:
            prediction = desk.ask(sight.predict, path)
        except RefusedError as error:
            return {said: message(str(error), bad=True)}
        duration = float(prediction.timeline.edges_seconds[-1])
        return {
            said: message("Writing the video for the player ..."),
            results: gr.Column(visible=True),
            seen: prediction,
            best: {one.label: one.probability for one in prediction.top(TOP)},
            chart: timeline(prediction),
            when: gr.Slider(maximum=max(0.1, round(duration, 1)), value=round(duration / 2, 1)),
        }

    def show_maps(prediction: Prediction | None, layer: str, seconds: float) -> str:
        if prediction is None:
            return ""
        try:
            return maps_page(*desk.ask(sight.maps, prediction.path, seconds, layer), seconds)
        except RefusedError as error:
            return message(str(error), bad=True)

    def play(prediction: Prediction | None) -> Iterator[dict[Any, Any]]:
        if prediction is None:
            yield {player: None}
            return
        with tempfile.TemporaryDirectory() as folder:  # gradio makes a copy
            output = Path(folder, f"{Path(prediction.path).stem}.predicted.mp4")
            try:
                desk.ask(sight.annotate, prediction, output)
                yield {said: "", player: str(output)}
            except RefusedError as error:
                yield {said: message(f"The player stays empty. {error}", bad=True)}

    title = f"octvideo: {name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(CLEANING_SECONDS, KEPT_SECONDS)) as page:
        seen = gr.State(time_to_live=KEPT_SECONDS)
        gr.Markdown(
            f"# What {trained.options['name']} sees\n{name}: alpha {say_alpha(trained.options['alpha'])}, "
            f"{len(trained.labels)} classes, clips of {frames} frames of {side} x {side} pixels"
        )
        limits = f"up to {max_megabytes:g} MB and {sight.max_seconds:g} s"
        upload = gr.File(label=f"Drop a video, {limits}", height=140)
        said = gr.HTML(elem_id="said")
        with gr.Column(visible="hidden") as results:
            with gr.Row():
                with gr.Column():
                    player = gr.Video(label="Video, with the class of each second", interactive=False, elem_id="player")
                with gr.Column():
                    best = gr.Label(label="Most likely classes", num_top_classes=TOP)
                    chart = gr.HTML(container=True, padding=True)
            gr.Markdown("## Maps of a layer")
            with gr.Row():
                layer = gr.Dropdown(list(sight.layers), value="res2", label="Layer", min_width=300)
                when = gr.Slider(0, 1, 0, step=0.1, label="Moment, in seconds", buttons=[], min_width=300)
            maps = gr.HTML()
        # A step for each part of the page: of updates that follow quickly in one step, the browser may lose some.
        private: dict[str, Any] = {"api_visibility": "private"}
        options: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", **private}
        begun = [said, results, seen, player, maps]
        started = upload.upload(lambda: begin("Looking at the video ..."), None, begun, queue=False, **private)
        steps = [
            started.then(look, upload, [said, results, seen, best, chart, when], trigger_mode="multiple", **options)
        ]
        for step, inputs, outputs in ((show_maps, [seen, layer, when], maps), (play, seen, [said, player])):
            steps.append(steps[-1].then(step, inputs, outputs, trigger_mode="multiple", **options))
        upload.clear(begin, None, begun, queue=False, cancels=steps, **private)
        often: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "minimal", **options}
        gr.on([layer.input, when.input], show_maps, [seen, layer, when], maps, **often)
    return page.queue(max_size=WAITING, api_open=False)


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint that train_net.py wrote")
    add("--alpha", type=float, help="alpha of res2 to res4; default: the checkpoint's")
    add("--host", default="127.0.0.1", help="address to serve at; default: 127.0.0.1, for this machine alone")
    add("--port", type=int, default=7860, help="default: 7860")
    add("--max-megabytes", metavar="N", type=float, default=100.0, help="largest file to take; default: 100")
    add("--max-seconds", metavar="S", type=float, default=60.0, help="longest video to take; default: 60")
    add("--clips", metavar="N", type=int, default=5, help="moments of a video for its score; default: 5")
    add("--crops", metavar="M", type=int, default=1, help="crops a moment; default: 1")
    add(
        *("--decode_timeout_seconds", "--decode-timeout-seconds"),
        metavar="S",
        type=float,
        default=60.0,
        help="a video whose decoder takes longer for a step is bad; default: 60",
    )
    arguments = parser.parse_args(words)
    for option in ("max_megabytes", "max_seconds", "clips", "crops", "decode_timeout_seconds"):
        if not 0 < (value := getattr(arguments, option)) < float("inf"):
            fail(f"--{option.replace('_', '-')} must be above 0, got {value:g}")
    if not 0 < arguments.port < 2**16:
        fail(f"--port must be 1 to {2**16 - 1}, got {arguments.port}")
    return arguments


def serve(arguments: argparse.Namespace, folder: Path) -> None:
    """Shows the page until the program is interrupted.

    Args:
        arguments: of the command line.
        folder: for uploads.
    """
    host, port = arguments.host, arguments.port
    if ":" in host:
        fail(f"--host must be a name or an address of IPv4, got {host}")
    try:  # before what takes seconds
        socket.create_server((host, port)).close()
    except OSError as error:
        fail(f"--host {host} --port {port}: {str(error.strerror).split(' (')[0]}")
    predictor = Predictor(
        load_trained(arguments.ckpt, arguments.alpha),
        num_clips=arguments.clips,
        num_crops=arguments.crops,
        device="cuda" if torch.cuda.is_available() else "cpu",
        decode_timeout_seconds=arguments.decode_timeout_seconds,
    )
    # Read when gradio is imported. It asks its own server whether it is there, which must not go through a proxy.
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*"}
    import gradio as gr

    desk = Desk()
    page = build(
        Sight(predictor, arguments.max_seconds), desk, name=arguments.ckpt.name, max_megabytes=arguments.max_megabytes
    )
    page.launch(
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        server_name=host,
        server_port=port,
        max_file_size=round(arguments.max_megabytes * 2**20),
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
    )
    print(f"http://{host}:{port} shows what {arguments.ckpt} sees; Ctrl-C ends it", flush=True)
    try:
        desk.work()
    finally:
        page.close(verbose=False)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the program as Ctrl-C does."""
    raise KeyboardInterrupt


def main(words: list[str]) -> int:
    """Runs the tool; returns its exit status."""
    arguments = read_arguments(words)
    signal.signal(signal.SIGTERM, stop)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="octvideo_demo_", ignore_cleanup_errors=True) as folder,
            one_line_errors(),
        ):
            serve(arguments, Path(folder))
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        fail("the page needs gradio: pip install 'octvideo[demo]'")
    except KeyboardInterrupt:
        pass
    return 0
