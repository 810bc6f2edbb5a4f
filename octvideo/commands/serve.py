"""Serves a network over HTTP: videos in, JSON out.

octvideo serve --ckpt CHECKPOINT | --onnx FILE [--host 127.0.0.1] [--port 8080]

curl -F video=@clip.mp4 http://127.0.0.1:8080/predict
curl --data-binary @clip.mp4 http://127.0.0.1:8080/predict?top=1
curl --json '{"url": "https://example.org/clip.mp4"}' http://127.0.0.1:8080/predict

POST /predict   a video, as a form's field "video", as the body, or by its URL; answers {"top": [{"label", "number",
                "probability"}, ...], "clips", "batch" (clips that the network saw at once), "seconds": {"receiving",
                "decoding", "network", "all"}}
GET /health     {"status": "ok", "network", "alpha", "runtime", "labels", "waiting"}; 503 where nothing is answered
GET /metrics    requests, their times and batches, for Prometheus
GET /docs       the same in OpenAPI

Mistakes are answered with {"error": "a sentence"}: 400 a request that makes no sense, 413 a video above
--max-megabytes, 422 what is no video or cannot be decoded, 503 (Retry-After: 1) more than --max-waiting requests at a
time, 504 one that takes longer than --timeout.

Videos by URL are off: --urls public takes http:// and https:// addresses of the public internet, --urls any those of
networks behind this machine, too. Uploads are deleted when they are answered. No path of this machine can be asked for.

It needs pip install 'octvideo[serve]'. There is no password and no encryption: by default only this machine can reach
it; put a proxy that has them in front of it otherwise.

Exit status: 0 if it was stopped by Ctrl-C or SIGTERM, when all requests under way are answered; 2 for a mistake in the
command.
"""

import asyncio
import contextlib
import http.client
import importlib.metadata
import ipaddress
import json
import os
import signal
import socket
import sys
import tempfile
import time
import urllib.parse
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from octvideo.commands.options import Parser, add_predictor, device_of, fail, number, one_line_errors, positive
from octvideo.errors import DecodeError, UserError
from octvideo.evaluation.prediction import Predictor, ranked
from octvideo.evaluation.serving import Batcher, Decoding, Served, of_onnx, of_predictor
from octvideo.models.checkpoint import load_trained

MOST_REDIRECTS = 5
CHUNK = 2**18  # bytes
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class RefusedError(Exception):
    """A request that gets no prediction: its HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def fetch(url: str, file: Path, most_bytes: int, seconds: float, public: bool) -> None:
    """Downloads a video; RefusedError for another address than http(s), where it fails, and for one that is too large.

    With `public`, names that lead to an address behind this machine are refused, and so are such connections.
    """
    ends, kinds = time.monotonic() + seconds, {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    for _ in range(MOST_REDIRECTS + 1):
        connection = None
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in kinds or not parts.hostname:
                raise RefusedError(400, "the url must start with http:// or https://")
            connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=seconds)
            if public:  # before it connects, which would tell whether a private port is open
                check_public(found[4][0] for found in socket.getaddrinfo(parts.hostname, connection.port))
            connection.connect()
            if public:  # the name may have changed its address
                check_public([connection.sock.getpeername()[0]])
            connection.request("GET", urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")))
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308) and (target := answer.getheader("Location")):
                url = urllib.parse.urljoin(url, target)
                continue
            if answer.status != 200:
                raise RefusedError(400, f"the url answered {answer.status} {answer.reason}")
            with file.open("wb") as output:
                while chunk := answer.read(CHUNK):
                    if output.tell() + len(chunk) > most_bytes:
                        raise RefusedError(413, f"the video is larger than {most_bytes / 2**20:.3g} MB")
                    if time.monotonic() > ends:
                        raise RefusedError(504, "the url did not answer in time")
                    output.write(chunk)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RefusedError(400, f"the url cannot be read: {reason}") from error
        finally:
            if connection is not None:
                connection.close()
    raise RefusedError(400, f"the url redirects more than {MOST_REDIRECTS} times")


def check_public(addresses: Iterable[Any]) -> None:
    """RefusedError for an address behind this machine."""
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in addresses):
        raise RefusedError(400, "the url leads to no address of the public internet")


async def receive_video(request: Any, file: Path, options: Namespace) -> None:
    """Writes the video of a request into a file; RefusedError if it has none, or a larger one than allowed."""
    most, read = round(options.max_megabytes * 2**20), 0
    too_large = RefusedError(413, f"the video is larger than {options.max_megabytes:g} MB")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    whole = most + 2**16  # with the form around it
    if int(request.headers.get("content-length") or 0) > whole:
        raise too_large
    original: Receive = request._receive

    async def counted() -> MutableMapping[str, Any]:
        nonlocal read
        message = await original()
        read += len(message.get("body", b""))
        if read > whole:
            raise too_large
        return message

    request._receive = counted
    if kind == "application/json":
        url = (await read_json(request)).get("url")
        if not isinstance(url, str):
            raise RefusedError(400, 'the body must be {"url": "https://..."}')
        if options.urls == "none":
            raise RefusedError(400, "this server takes no urls: it was not started with --urls")
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, fetch, url, file, most, options.timeout, options.urls == "public")
        return
    if kind == "multipart/form-data":
        from starlette.datastructures import UploadFile
        from starlette.exceptions import HTTPException

        try:
            form = await request.form(max_files=1, max_fields=8)
        except HTTPException as error:
            raise RefusedError(400, f"the form cannot be read: {error.detail}") from error
        video = form.get("video")
        if not isinstance(video, UploadFile):
            raise RefusedError(400, 'the form has no file in its field "video"')
        with file.open("wb") as output:
            while chunk := await video.read(CHUNK):
                output.write(chunk)
        await form.close()
    else:
        with file.open("wb") as output:
            async for chunk in request.stream():
                output.write(chunk)
    if file.stat().st_size == 0:
        raise RefusedError(400, "the video is empty")
    if file.stat().st_size > most:
        raise too_large


async def read_json(request: Any) -> dict[str, Any]:
    """The JSON object in a request's body; RefusedError for anything else."""
    try:
        content = json.loads(await request.body())
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RefusedError(400, 'the body must be {"url": "https://..."}')
    return content


def build(served: Served, decoding: Decoding, batcher: Batcher, options: Namespace) -> Any:
    """The application of FastAPI."""
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.requests import ClientDisconnect

    app, registry = FastAPI(title="octvideo", version=importlib.metadata.version("octvideo")), CollectorRegistry()
    requests = Counter("octvideo_requests", "Requests that were answered", ["status"], registry=registry)
    times = Histogram("octvideo_seconds", "Time of a request", ["part"], registry=registry)
    batches = Histogram(
        "octvideo_batch_clips", "Clips scored at once", buckets=(1, 2, 5, 10, 20, 50), registry=registry
    )
    gauge = Gauge("octvideo_waiting", "Requests under way", registry=registry)
    pool = ThreadPoolExecutor(options.processes, thread_name_prefix="decoding")
    under_way = 0

    async def answer(request: Request, top: int) -> dict[str, Any]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="octvideo_serve_", ignore_cleanup_errors=True) as folder:
            file = Path(folder, "upload")
            await receive_video(request, file, options)
            received = time.perf_counter()
            clips = await asyncio.get_running_loop().run_in_executor(pool, decoding, str(file))
        decoded = time.perf_counter()
        scored = await asyncio.wrap_future(batcher.submit(clips))
        ended = time.perf_counter()
        batches.observe(scored.together)
        seconds = {"receiving": received - began, "decoding": decoded - received, "network": ended - decoded}
        for part, taken in (seconds | {"all": ended - began}).items():
            times.labels(part).observe(taken)
        best = [one._asdict() for one in ranked(scored.scores.mean(0).numpy(), served.labels, top)]
        return {"top": best, "clips": len(clips), "batch": scored.together, "seconds": seconds | {"all": ended - began}}

    @app.post("/predict")
    async def predict(request: Request, top: int = Query(5, ge=1, description="how many classes")) -> JSONResponse:
        """Predicts a video: a form's field "video", the body, or {"url": ...} as JSON."""
        nonlocal under_way
        status, content, headers = 200, {}, {}
        try:
            if under_way >= options.max_waiting:
                headers = {"Retry-After": "1"}
                raise RefusedError(503, f"{under_way} requests are under way; try again later")
            under_way += 1
            gauge.set(under_way)
            try:
                content = await asyncio.wait_for(answer(request, top), options.timeout)
            finally:
                under_way -= 1
                gauge.set(under_way)
        except RefusedError as error:
            status, content = error.status, {"error": str(error)}
        except DecodeError as error:
            status, content = 422, {"error": f"the video cannot be decoded: {error.reason}"}
        except ClientDisconnect:  # nobody reads the answer
            status, content = 499, {"error": "the client has gone"}
        except TimeoutError:
            status, content = 504, {"error": f"there was no answer within {options.timeout:g} s"}
        except Exception as error:
            print(f"octvideo serve: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status, content = 500, {"error": "the network failed on this video"}
        requests.labels(str(status)).inc()
        return JSONResponse(content, status, headers)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        requests.labels("422").inc()
        return JSONResponse({"error": "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())}, 422)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether videos are answered, and by which network."""
        state = {"status": "ok" if batcher.alive else "the network's thread has ended"}
        content = state | served.about | {"labels": list(served.labels), "waiting": under_way}
        return JSONResponse(content, 200 if batcher.alive else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(registry).decode(), media_type=CONTENT_TYPE_LATEST)

    return app


def read_arguments(words: list[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add_predictor(parser, clips=5, crops=1, required=False)
    add("--onnx", type=Path, metavar="FILE", help="a file of octvideo export, in place of --ckpt")
    add("--device", help="of --ckpt; default: cuda if there is one, else cpu")
    add("--host", default="127.0.0.1", help="address to serve at; default: 127.0.0.1, for this machine alone")
    add("--port", type=int, default=8080, help="default: 8080; 0: any that is free")
    add("--processes", metavar="N", type=number, default=os.cpu_count() or 1, help="for decoding; default: cores")
    add("--max-batch", metavar="N", type=number, default=30, help="clips that the network sees at once; default: 30")
    add("--max-waiting", metavar="N", type=number, default=64, help="requests at a time; default: 64")
    add("--max-megabytes", metavar="N", type=positive, default=100.0, help="largest video; default: 100")
    add("--timeout", metavar="S", type=positive, default=60.0, help="for a request, in seconds; default: 60")
    add("--urls", choices=("none", "public", "any"), default="none", help="which videos by URL; default: none")
    arguments = parser.parse_args(words)
    if (arguments.ckpt is None) == (arguments.onnx is None):
        fail("give one of --ckpt and --onnx")
    if arguments.onnx and (arguments.alpha is not None or arguments.device):
        fail("--alpha and --device are for --ckpt: an exported network is as it was written")
    if not 0 <= arguments.port < 2**16:
        fail(f"--port must be 0 to {2**16 - 1}, got {arguments.port}")
    return arguments


def main(words: list[str]) -> int:
    arguments = read_arguments(words)
    with one_line_errors():
        try:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import python_multipart  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise UserError(f"serving needs python -m pip install 'octvideo[serve]': {error}") from None
        try:
            listening = socket.create_server((arguments.host, arguments.port))
        except OSError as error:
            fail(f"--host {arguments.host} --port {arguments.port}: {str(error.strerror).split(' (')[0]}")
        limit = arguments.decode_timeout_seconds or arguments.timeout
        if arguments.onnx:
            served = of_onnx(arguments.onnx)
        else:
            trained = load_trained(arguments.ckpt, arguments.alpha)
            predictor = Predictor(trained, device=device_of(arguments.device), decode_timeout_seconds=None)
            served = of_predictor(predictor)
        decoding = Decoding(served.preprocessing, arguments.clips, arguments.crops, arguments.processes, limit)
    batcher = Batcher(served.score, arguments.max_batch)
    app = build(served, decoding, batcher, arguments)
    host, port = listening.getsockname()[:2]
    print(f"http://{host}:{port} serves {arguments.onnx or arguments.ckpt}; Ctrl-C stops it", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=round(arguments.timeout))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises what stopped it, when it has ended
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    batcher.close()
    return 0
