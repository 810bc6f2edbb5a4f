"""Serves a page that shows a checkpoint's predictions and feature maps for videos dropped on it.

octvideo demo --ckpt CHECKPOINT [--alpha A] [--port 7860] [--max-megabytes 100] [--max-seconds 60]

The page shows the video, upright, in a format that every browser plays, with the most likely class of the current
second drawn in; the five most likely classes, averaged over --clips clips and --crops crops; their probability in each
second, from one clip around its middle; and a layer's high and low feature maps for a clip around a chosen time: mean
magnitude and strongest channels.

It needs gradio, pip install 'octvideo[demo]', and no internet. By default only this machine can open it. --host 0.0.0.0
admits everyone who can reach it, with no password and no limit on the number of uploads: use it on networks that you
trust. Visitors are served one at a time. Uploads are deleted after an hour or when the demo ends.

Exit status: 0 if it was stopped by Ctrl-C or SIGTERM; 2 for a mistake in the command.
"""

import base64
import contextlib
import functools
import importlib.util
import io
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from octvideo.commands.options import Parser, add_predictor, fail, one_line_errors, positive
from octvideo.data.video import Video
from octvideo.data.watchdog import HungError
from octvideo.errors import UserError
from octvideo.evaluation.drawing import annotate, clock
from octvideo.evaluation.feature_maps import Maps, heat, layers_of, maps_of
from octvideo.evaluation.prediction import Prediction, Predictor, clips_around
from octvideo.evaluation.report import say_alpha
from octvideo.models.checkpoint import load_trained

TOP, STRONGEST = 5, 8  # classes and channels shown
KEPT_SECONDS = 3600  # of uploads
Result = TypeVar("Result")


class RefusedError(UserError):
    """A video that the page does not accept; the message says why."""


class Sight:
    """Computes what the page shows, for videos of at most `max_seconds`. All its methods raise RefusedError."""

    def __init__(self, predictor: Predictor, max_seconds: float) -> None:
        self.predictor, self.max_seconds = predictor, max_seconds
        self.layers = layers_of(predictor.trained.network)
        self._duration, self._clip = predictor.watched(self._read_duration), predictor.watched(self._read_clip)
        # The time is limited because a header may claim that hours of frames last one second.
        self._annotate = predictor.watched(functools.partial(annotate, most_seconds=120.0))

    def predict(self, path: str) -> Prediction:
        seconds, limit = self._attempt(self._duration, path), self.max_seconds
        if seconds > limit:
            raise RefusedError(f"This video runs {clock(seconds)}; the longest one allowed is {clock(limit)}.")
        return self._attempt(self.predictor, path)

    def annotate(self, prediction: Prediction, output: Path) -> None:
        self._attempt(self._annotate, (prediction, output))

    def maps(self, path: str, seconds: float, layer: str) -> tuple[NDArray[np.uint8], list[list[Maps]]]:
        """The middle frame (H, W, 3) of the clip around a time, and one of the `layers`' maps for it, as `maps_of`."""
        if not os.path.exists(path):
            raise RefusedError("The video is no longer here; please drop it again.")
        clip, trained = self._attempt(self._clip, (path, seconds)), self.predictor.trained
        normalised = trained.normalize(torch.from_numpy(clip).to(self.predictor.device))
        return clip[:, clip.shape[1] // 2].transpose(1, 2, 0), maps_of(trained.network, self.layers[layer], normalised)

    def _read_duration(self, path: str) -> float:
        with Video(path, self.predictor.backend) as video:
            return video.duration_seconds

    def _read_clip(self, job: tuple[str, float]) -> Any:
        path, seconds = job
        with Video(path, self.predictor.backend) as video:
            return clips_around(video, [seconds], self.predictor.trained.preprocessing)[0]

    def _attempt(self, read: Callable[[Any], Result], job: Any) -> Result:
        try:
            return read(job)
        except (HungError, ValueError, OSError) as error:  # a DecodeError's reason does not name the upload's path
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise RefusedError(f"This video cannot be shown: {reason}.") from error


def png(pixels: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@functools.cache
def parts() -> Any:
    """The macros of demo.html, which make parts of the page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters.update(clock=clock, heat=heat, png=png)
    return environment.get_template("demo.html").module


def build(sight: Sight, worker: Executor, *, name: str, max_megabytes: float) -> Any:
    """The page of a checkpoint's name, as gradio's Blocks; `sight` computes in the `worker`."""
    import gradio as gr

    html, trained = parts(), sight.predictor.trained
    sizes = " x ".join(map(str, trained.preprocessing.clip_size[1:]))

    def begin(text: str = "") -> tuple[Any, ...]:
        return html.message(text), gr.Column(visible="hidden"), None, None, ""

    def look(path: str) -> dict[Any, Any]:
        try:
            prediction = worker.submit(sight.predict, path).result()
        except RefusedError as error:
            return {said: html.message(error, bad=True)}
        duration = float(prediction.timeline.edges_seconds[-1])
        return {
            said: html.message("Writing the video for the player ..."),
            results: gr.Column(visible=True),
            seen: prediction,
            best: {one.label: one.probability for one in prediction.top(TOP)},
            chart: html.timeline(prediction, TOP),
            when: gr.Slider(maximum=max(0.1, round(duration, 1)), value=round(duration / 2, 1)),
        }

    def show_maps(prediction: Prediction | None, layer: str, seconds: float) -> Any:
        if prediction is None:
            return ""
        try:
            found = worker.submit(sight.maps, prediction.path, seconds, layer).result()
            return html.maps_page(*found, seconds, STRONGEST)
        except RefusedError as error:
            return html.message(error, bad=True)

    def play(prediction: Prediction | None) -> Iterator[dict[Any, Any]]:
        if prediction is None:
            yield {player: None}
            return
        with tempfile.TemporaryDirectory() as folder:  # gradio makes a copy
            output = Path(folder, f"{Path(prediction.path).stem}.predicted.mp4")
            try:
                worker.submit(sight.annotate, prediction, output).result()
                yield {said: "", player: str(output)}
            except RefusedError as error:
                yield {said: html.message(f"The player stays empty. {error}", bad=True)}

    with gr.Blocks(title=f"octvideo: {name}", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        seen = gr.State(time_to_live=KEPT_SECONDS)
        gr.Markdown(
            f"# {trained.name} on your videos\n{name}: alpha {say_alpha(trained.options['alpha'])}, "
            f"{len(trained.labels)} classes, clips of {sizes} (frames, height, width)"
        )
        upload = gr.File(label=f"Drop a video, up to {max_megabytes:g} MB and {sight.max_seconds:g} s", height=140)
        said = gr.HTML(elem_id="said")
        with gr.Column(visible="hidden") as results:
            with gr.Row():
                with gr.Column():
                    player = gr.Video(label="Video, with the class of each second", interactive=False, elem_id="player")
                with gr.Column():
                    best = gr.Label(label="Most likely classes", num_top_classes=TOP)
                    chart = gr.HTML(container=True, padding=True)
            gr.Markdown("## Feature maps of a layer")
            with gr.Row():
                layer = gr.Dropdown(list(sight.layers), value="res2", label="Layer", min_width=300)
                when = gr.Slider(0, 1, 0, step=0.1, label="Time in seconds", buttons=[], min_width=300)
            maps = gr.HTML()
        # A step for each part of the page: the browser may lose updates that follow each other quickly in one step.
        private: dict[str, Any] = {"api_visibility": "private"}
        options: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", **private}
        begun = [said, results, seen, player, maps]
        step = upload.upload(lambda: begin("Looking at the video ..."), None, begun, queue=False, **private)
        shown, chosen, steps = [said, results, seen, best, chart, when], [seen, layer, when], []
        for work in ((look, upload, shown), (show_maps, chosen, maps), (play, seen, [said, player])):
            steps.append(step := step.then(*work, trigger_mode="multiple", **options))
        upload.clear(begin, None, begun, queue=False, cancels=steps, **private)
        options |= {"trigger_mode": "always_last", "show_progress": "minimal"}
        gr.on([layer.input, when.input], show_maps, chosen, maps, **options)
    return page.queue(max_size=20, api_open=False)


def main(words: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add_predictor(parser, clips=5, crops=1)
    add("--host", default="127.0.0.1", help="address to serve at; default: 127.0.0.1, for this machine alone")
    add("--port", type=int, default=7860, help="default: 7860")
    add("--max-megabytes", metavar="N", type=positive, default=100.0, help="largest upload; default: 100")
    add("--max-seconds", metavar="S", type=positive, default=60.0, help="longest video; default: 60")
    arguments = parser.parse_args(words)
    if not 0 < arguments.port < 2**16:
        fail(f"--port must be 1 to {2**16 - 1}, got {arguments.port}")
    if ":" in arguments.host:
        fail(f"--host must be a name or an IPv4 address, got {arguments.host}")
    host, port = arguments.host, arguments.port
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    uploads = tempfile.TemporaryDirectory(prefix="octvideo_demo_", ignore_cleanup_errors=True)
    with contextlib.suppress(KeyboardInterrupt), uploads as folder, one_line_errors():
        try:  # before the slow parts
            socket.create_server((host, port)).close()
        except OSError as error:
            fail(f"--host {host} --port {port}: {str(error.strerror).split(' (')[0]}")
        trained, device = load_trained(arguments.ckpt, arguments.alpha), "cuda" if torch.cuda.is_available() else "cpu"
        views, timeout = {"num_clips": arguments.clips, "num_crops": arguments.crops}, arguments.decode_timeout_seconds
        predictor = Predictor(trained, device=device, decode_timeout_seconds=timeout, **views)
        if importlib.util.find_spec("gradio") is None:
            fail("the page needs gradio: pip install 'octvideo[demo]'")
        # Read when gradio is imported. It checks whether its own server answers, which must not go through a proxy.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*"}
        import gradio as gr

        # One thread that lasts: a decoding process dies with the thread that started it, and a web server's end.
        worker, sight = ThreadPoolExecutor(1), Sight(predictor, arguments.max_seconds)
        page = build(sight, worker, name=arguments.ckpt.name, max_megabytes=arguments.max_megabytes)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        style = {"theme": theme, "css_paths": Path(__file__).with_name("demo.css"), "footer_links": []}
        place = {"server_name": host, "server_port": port, "max_file_size": round(arguments.max_megabytes * 2**20)}
        off = dict.fromkeys(("share", "ssr_mode", "run_history", "enable_monitoring"), False)
        page.launch(prevent_thread_lock=True, quiet=True, **place, **style, **off)
        print(f"http://{host}:{port} serves {arguments.ckpt}; Ctrl-C stops it", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    sys.stdout.flush()
    os._exit(0)  # the worker may be at work; its decoding processes end with this one
