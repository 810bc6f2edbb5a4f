"""Measures octvideo predict --stream on a stream of 30 frames a second that another process serves.

python experiments/streams.py --ckpt FILE [--minutes 10] [--outage 10] [--every 1] [--size 360] [--json FILE]

The server sends eight made movements in turn, as MPEG-TS over HTTP, each frame when it is due. In the middle it is
killed, and comes back after --outage seconds. Measured, on the clock of this machine:
  lag      from when the server sends the newest frame of a clip to when the clip has its label
  latency  the part of it that the command states: from the arrival of that frame
  memory   of the command, resident, every second, and the share of a core that it took
  right    clips whose label is the movement that the server sent, of those within one
A frame's timestamp says when it was due at the server, so that the lag needs no trust in the command.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from octvideo.commands.options import Parser, number, one_line_errors, positive
from octvideo.data.motions import CLASSES, FRAMES, draw, movement
from octvideo.files import appearing
from octvideo.models.cost import hardware

ROOT = Path(__file__).parent.parent
FPS = 30
CLOCK = 90_000  # ticks of MPEG-TS in a second


def loop_of_movements(size: int, gop: int = FPS) -> bytes:
    """MPEG-TS of one video of each class, one after the other, size x size, without B-frames."""
    options = {"preset": "ultrafast", "tune": "zerolatency", "g": str(gop), "threads": "1"}
    file = BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        for label, name in enumerate(CLASSES):
            rng = np.random.default_rng((0, 1, label))
            for image in draw(movement(name, rng), rng):
                frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(size, size, "yuv420p")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


class Sending(BaseHTTPRequestHandler):
    """Sends the server's loop over and over, each frame when it is due by the server's clock."""

    loop: bytes
    epoch: float  # time.time() at which the clock of the timestamps starts

    def do_GET(self) -> None:  # noqa: D102
        self.send_response(200)
        self.send_header("Content-Type", "video/mp2t")
        self.end_headers()
        with av.open(BytesIO(self.loop), "r") as source:
            template = source.streams.video[0]
            frames = [(bytes(packet), packet.is_keyframe) for packet in source.demux(template) if packet.size]
            flushing = {"flush_packets": "1", "muxdelay": "0", "muxpreload": "0"}
            # ConnectionError: the client has left.
            try:
                with av.open(self, "w", format="mpegts", container_options=flushing) as target:
                    stream = target.add_stream_from_template(template)
                    now = int((time.time() - self.epoch) * FPS)
                    first = next(place for place in itertools.count(now + 1) if frames[place % len(frames)][1])
                    for place in itertools.count(first):
                        data, is_key = frames[place % len(frames)]
                        packet = av.Packet(data)
                        packet.stream, packet.is_keyframe = stream, is_key
                        packet.pts = packet.dts = place * CLOCK // FPS
                        packet.time_base = Fraction(1, CLOCK)
                        time.sleep(max(0.0, self.epoch + place / FPS - time.time()))
                        target.mux(packet)
            except (OSError, av.error.FFmpegError):
                return

    def write(self, data: bytes) -> int:
        """For the muxer."""
        return self.wfile.write(data)

    def log_message(self, *_: Any) -> None:  # noqa: D102
        pass


def serve(port: int, epoch: float, loop: bytes) -> None:
    """Serves the loop to all who come, for ever."""
    handler = type("Handler", (Sending,), {"loop": loop, "epoch": epoch})
    ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


class Server:
    """The server in a process of its own, which can be killed and started again."""

    def __init__(self, port: int, loop: bytes) -> None:
        self.port, self.loop, self.epoch = port, loop, time.time()
        self.start()

    def start(self) -> None:
        """Starts the process, again with the same clock."""
        arguments = self.port, self.epoch, self.loop
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        self.process.start()

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.process.kill()
        self.process.join()


def resident(pid: int) -> float:
    """Memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def shown(timestamp: float) -> str:
    """The movement that the server shows at a time of its clock."""
    return CLASSES[round(timestamp * FPS) // FRAMES % len(CLASSES)]


def summary(records: Sequence[dict[str, Any]], memory: Sequence[dict[str, float]], epoch: float) -> dict[str, Any]:
    """What some of the steps, and of the seconds of memory, say."""
    lags = [datetime.fromisoformat(one["time"]).timestamp() - epoch - one["timestamp"] for one in records]
    latencies = [one["latency_seconds"] for one in records]
    whole = [one for one in records if shown(one["timestamp"]) == shown(one["timestamp"] - 15 / FPS)]
    right = sum(one["predictions"][0]["label"] == shown(one["timestamp"]) for one in whole)
    found: dict[str, Any] = {"steps": len(records), "right": right, "within_a_movement": len(whole)}
    for name, values in (("lag", lags), ("latency", latencies)):
        of_order = {"median": statistics.median(values), "p95": float(np.percentile(values, 95)), "max": max(values)}
        found |= {f"{name}_{what}_ms": round(1000 * value, 1) for what, value in of_order.items()}
    sizes = [one["megabytes"] for one in memory]
    found |= {"memory_first_mb": round(sizes[0], 1), "memory_last_mb": round(sizes[-1], 1)}
    return found | {"memory_most_mb": round(max(sizes), 1)}


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs server and command, and returns all that was seen."""
    port = arguments.port
    server, seconds = Server(port, loop_of_movements(arguments.size)), 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder, "steps.jsonl")
        words = ["--stream", f"--ckpt={arguments.ckpt}", f"--every={arguments.every}", f"--json={steps}", "--top=1"]
        words += [f"--save-video={folder}/segments"] if arguments.save_video else []
        time.sleep(5)  # for the server to start
        command: list[str | Path] = [sys.executable, ROOT / "tools" / "predict.py", f"http://127.0.0.1:{port}/", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not (steps.exists() and steps.stat().st_size):
            if process.poll() is not None:
                raise OSError(f"the command ended: {process.communicate()[0]}")
            time.sleep(0.1)
        printed: list[str] = []
        assert process.stdout is not None
        threading.Thread(target=lambda: printed.extend(process.stdout or ()), daemon=True).start()
        begun, cpu, memory = time.time(), cpu_seconds(process.pid), list[dict[str, float]]()
        loads, outage = list[float](), list[float]()
        while (now := time.time() - begun) < seconds:
            memory.append({"seconds": round(now, 1), "megabytes": round(resident(process.pid), 1)})
            loads.append(os.getloadavg()[0])
            if not outage and now >= seconds / 2:
                server.kill()
                outage.append(time.time())
            elif len(outage) == 1 and time.time() - outage[0] >= arguments.outage:
                server.start()
                outage.append(time.time())
            time.sleep(1)
        cpu = (cpu_seconds(process.pid) - cpu) / (time.time() - begun)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        status = process.wait(60)
        ended = time.monotonic() - asked
        server.kill()
        records = [json.loads(line) for line in steps.read_text().splitlines()]
    times = [datetime.fromisoformat(one["time"]).timestamp() for one in records]
    parts = {"whole": (0.0, np.inf), "before_outage": (0.0, outage[0]), "after_outage": (outage[1], np.inf)}
    parts |= {"first_minute": (0.0, begun + 60), "last_minute": (begun + seconds - 60, np.inf)}
    found: dict[str, Any] = {"machine": hardware("cpu"), "every_seconds": arguments.every, "size": arguments.size}
    found |= {"seconds": seconds, "outage_seconds": outage[1] - outage[0], "cores": round(cpu, 3), "status": status}
    found |= {"load_of_machine": round(statistics.mean(loads), 2), "ended_after_seconds": round(ended, 2)}
    found["back_after_seconds"] = round(min(moment for moment in times if moment > outage[1]) - outage[1], 2)
    for name, (start, end) in parts.items():
        inside = [one for one, moment in zip(records, times, strict=True) if start <= moment < end]
        sizes = [one for one in memory if start <= begun + one["seconds"] < end]
        found[name] = summary(inside, sizes, server.epoch)
    last = records[-1]
    found |= {name: last[name] for name in ("received", "dropped", "reconnects")}
    lags = [round(moment - server.epoch - one["timestamp"], 4) for one, moment in zip(records, times, strict=True)]
    moments = [round(moment - begun, 2) for moment in times]
    console.print("".join(line for line in printed if not line.startswith("  ")).strip(), highlight=False)
    return found | {"steps": [list(pair) for pair in zip(moments, lags, strict=True)], "memory": memory[::10]}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint of the quickstart")
    add("--minutes", type=positive, default=10.0, help="default: 10")
    add("--outage", metavar="SECONDS", type=positive, default=10.0, help="default: 10")
    add("--every", metavar="SECONDS", type=positive, default=1.0, help="default: 1")
    add("--size", type=number, default=360, help="height and width of the frames; default: 360")
    add("--port", type=number, default=8765, help="default: 8765")
    add("--save-video", action="store_true", help="have the command write segments too")
    add("--json", metavar="FILE", type=Path, help="file for all that was measured")
    return parser.parse_args(words)


def main() -> None:
    """The script."""
    arguments, console = parse(), Console(highlight=False)
    with one_line_errors():
        found = measure(arguments, console)
        table = Table("", "whole", "first minute", "last minute", "before the outage", "after it")
        for row in found["whole"]:
            names = ("whole", "first_minute", "last_minute", "before_outage", "after_outage")
            table.add_row(row, *(str(found[name][row]) for name in names))
        console.print(table, {name: value for name, value in found.items() if not isinstance(value, dict | list)})
        if arguments.json is not None:
            with appearing(arguments.json) as partial:
                partial.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
