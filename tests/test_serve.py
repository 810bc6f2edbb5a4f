"""Predictions over HTTP: what is answered, what is refused, and that nothing is lost."""

import asyncio
import http.server
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import long, run_tool, start_tool

from octvideo.commands import serve
from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.evaluation.prediction import predict
from octvideo.evaluation.serving import Batcher, Decoding, Served, of_onnx

testclient = pytest.importorskip("fastapi.testclient", reason="pip install 'octvideo[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'octvideo[serve]'")
HOW = Preprocessing(clip_frames=4, frame_stride=2, crop_size=32, short_side=(32, 32), test_crop_size=32)
OPTIONS = {"max_megabytes": 1.0, "timeout": 20.0, "urls": "none", "processes": 2, "max_waiting": 8}


def brightness(clips):
    """Probabilities (N, 2) of dark and bright."""
    bright = torch.from_numpy(clips).float().mean((1, 2, 3, 4)) / 255
    return torch.stack([1 - bright, bright], 1)


@pytest.fixture(scope="module")
def decoding():
    return Decoding(HOW, 2, 1, 2, 20.0)


@pytest.fixture
def served(decoding):
    """Starts the application with options; gives a client of it."""
    batchers = []

    def start(score=brightness, **options):
        batchers.append(Batcher(score, 30))
        network = Served(score, ["dark", "bright"], HOW, {"network": "test", "alpha": 0.25, "runtime": "none"})
        app = serve.build(network, decoding, batchers[-1], SimpleNamespace(**(OPTIONS | options)))
        return testclient.TestClient(app)

    yield start
    for batcher in batchers:
        batcher.close()


def test_a_video_comes_as_a_form_or_as_the_body(served, numbered_video):
    client, video = served(), numbered_video.read_bytes()
    form = client.post("/predict", files={"video": ("../../etc/passwd", video)})
    body = client.post("/predict?top=1", content=video, headers={"Content-Type": "video/mp4"})
    assert form.status_code == body.status_code == 200, (form.text, body.text)
    assert [one["label"] for one in form.json()["top"]] == ["dark", "bright"]
    assert form.json()["top"][:1] == body.json()["top"]
    assert sum(one["probability"] for one in form.json()["top"]) == pytest.approx(1)
    assert form.json()["clips"] == 2
    assert set(form.json()["seconds"]) == {"receiving", "decoding", "network", "all"}


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b""}, 400, "the video is empty"),
        ({"content": b"no video" * 100}, 422, "cannot be decoded"),
        ({"files": {"film": b"x"}}, 400, 'no file in its field "video"'),
        ({"data": {"video": "/etc/passwd"}}, 422, "cannot be decoded"),
        ({"files": {"video": b"x"}, "data": {f"f{i}": "x" for i in range(20)}}, 400, "the form cannot be read"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "not JSON"),
        ({"json": ["http://x"]}, 400, "the body must be"),
        ({"json": {"path": "/etc/passwd"}}, 400, "the body must be"),
        ({"json": {"url": "http://127.0.0.1/"}}, 400, "takes no urls"),
        ({"content": b"x" * (2**20 + 2**17)}, 413, "larger than 1 MB"),
        ({"content": iter([b"x" * 2**19] * 4)}, 413, "larger than 1 MB"),
        ({"files": {"video": b"x" * (2**20 + 2**10)}}, 413, "larger than 1 MB"),
    ],
)
def test_what_is_no_video_gets_a_status_and_a_sentence(served, request_, status, message):
    answer = served().post("/predict", **request_)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_a_playlist_opens_no_file_of_the_server(served, numbered_video, tmp_path):
    (tmp_path / "private.mp4").write_bytes(numbered_video.read_bytes())
    playlists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{tmp_path}/private.mp4\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {tmp_path}/private.mp4\n",
    ]
    for text in playlists:
        answer = served().post("/predict", content=text.encode())
        assert answer.status_code == 422
        assert "top" not in answer.json()
        assert str(tmp_path) not in answer.text


def test_numbers_of_classes_are_checked(served, numbered_video):
    video = numbered_video.read_bytes()
    client = served()
    refused = client.post("/predict?top=0", content=video)
    assert (refused.status_code, list(refused.json())) == (422, ["error"])
    assert refused.json()["error"].startswith("top: ")
    assert 'octvideo_requests_total{status="422"} 1.0' in client.get("/metrics").text
    assert len(served().post("/predict?top=99", content=video).json()["top"]) == 2


class Files(http.server.BaseHTTPRequestHandler):
    """Serves /video, and errors."""

    video = b""

    def do_GET(self):
        if self.path.startswith("/again"):
            self.send_response(302)
            self.send_header("Location", "/video?x" if self.path == "/again" else self.path)
            self.end_headers()
        elif self.path.startswith("/video"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.video * (20 if "large" in self.path else 1))
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def files(numbered_video):
    Files.video = numbered_video.read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_videos_by_url(served, files):
    client = served(urls="any", max_megabytes=0.05)
    for path in ("/video", "/again"):
        answer = client.post("/predict", json={"url": files + path})
        assert answer.status_code == 200, answer.text
    wrong = {
        "/none": (400, "answered 404"),
        "/again_and_again": (400, "redirects more than 5 times"),
        "/video_large": (413, "larger than 0.05 MB"),
    }
    for path, (status, message) in wrong.items():
        answer = client.post("/predict", json={"url": files + path})
        assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        assert "cannot be read" in client.post("/predict", json={"url": closed}).json()["error"]
    for url in ("file:///etc/passwd", "/etc/passwd", "ftp://x/y", "http://", "http://[::1", "https://127.0.0.1:99999/"):
        assert client.post("/predict", json={"url": url}).status_code == 400, url


def test_public_urls_lead_to_no_address_behind_the_server(served, files, monkeypatch):
    client = served(urls="public")
    asked = []
    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda *words, **_: asked.append(words))
    for address in (files, files.replace("127.0.0.1", "localhost")):
        answer = client.post("/predict", json={"url": f"{address}/video"})
        assert (answer.status_code, "public internet" in answer.json()["error"]) == (400, True)
    assert asked == []


def test_a_name_that_changes_its_address_is_not_asked(served, files, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", resolve := Resolving(socket.getaddrinfo))
    monkeypatch.setattr(http.client.HTTPConnection, "request", lambda *words, **_: asked.append(words))
    answer = served(urls="public").post("/predict", json={"url": f"{files}/video"})
    assert (answer.status_code, "public internet" in answer.json()["error"]) == (400, True)
    assert (asked, resolve.lies) == ([], 0)


class Resolving:
    """Says a public address once, then the true one."""

    def __init__(self, true):
        self.true, self.lies = true, 1

    def __call__(self, *words, **options):
        if self.lies:
            self.lies = 0
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))]
        return self.true(*words, **options)


def test_too_many_requests_are_told_to_come_again_and_slow_ones_end(served, numbered_video):
    started, go = threading.Event(), threading.Event()

    def slow(clips):
        started.set()
        go.wait(20)
        return brightness(clips)

    client, video = served(slow, max_waiting=1), numbered_video.read_bytes()
    with client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/predict", content=video)
        assert started.wait(20)
        second = client.post("/predict", content=video)
        assert (second.status_code, second.headers["retry-after"]) == (503, "1")
        assert client.get("/health").json()["waiting"] == 1
        go.set()
        assert first.result().status_code == 200
        assert client.get("/health").json()["waiting"] == 0
        counts = client.get("/metrics").text
    assert 'octvideo_requests_total{status="200"} 1.0' in counts
    assert 'octvideo_requests_total{status="503"} 1.0' in counts
    go.clear()
    hasty = served(slow, timeout=0.5)
    assert hasty.post("/predict", content=video).status_code == 504
    go.set()
    assert served().post("/predict", content=video).status_code == 200


def test_a_network_that_fails_says_nothing_of_the_server(served, numbered_video, capsys):
    def broken(clips):
        raise RuntimeError("/secret/path")

    client = served(broken)
    answer = client.post("/predict", content=numbered_video.read_bytes())
    assert (answer.status_code, answer.json()) == (500, {"error": "the network failed on this video"})
    assert "/secret/path" in capsys.readouterr().err
    assert client.get("/health").status_code == 200


def test_a_client_that_hangs_up_is_counted_and_leaves_room(served):
    client = served(max_waiting=1)
    parts = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert 'octvideo_requests_total{status="499"} 1.0' in client.get("/metrics").text
    assert client.get("/health").json()["waiting"] == 0


def test_requests_that_wait_are_scored_together_and_one_failure_is_one():
    first, go, sizes = threading.Event(), threading.Event(), []

    def score(clips):
        sizes.append(len(clips))
        first.set()
        go.wait(20)
        if (clips == 13).any():
            raise ValueError("13")
        return brightness(clips)

    batcher = Batcher(score, 6)
    clips = [np.full((2, 3, 1, 2, 2), value, np.uint8) for value in (0, 10, 13, 30, 40, 50, 60)]
    futures = [batcher.submit(clips[0])]
    assert first.wait(20)
    futures += [batcher.submit(part) for part in clips[1:]]
    futures[4].cancel()
    large = batcher.submit(np.zeros((9, 3, 1, 2, 2), np.uint8))
    go.set()
    for value, future in zip((0, 10, None, 30, None, 50, 60), futures, strict=True):
        if value is not None:
            assert future.result(20).scores[:, 1].tolist() == pytest.approx([value / 255] * 2)
    assert isinstance(futures[2].exception(20), ValueError)
    assert len(large.result(20).scores) == 9
    assert sizes[:2] == [2, 6]  # the first alone, then as many as may be
    assert futures[6].result().together == 4
    batcher.close()
    assert not batcher.alive


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --ckpt and --onnx"),
        (["--onnx=x.onnx", "--alpha=.5"], "--alpha and --device are for --ckpt"),
        (["--onnx=x.onnx", "--port=70000"], "--port must be 0 to 65535"),
        (["--onnx=x.onnx", "--urls=all"], "invalid choice"),
        (["--onnx=x.onnx", "--max-waiting=0"], "must be a whole number from 1"),
        (["--ckpt=none.ckpt"], "none.ckpt"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main([*words, *([] if "--port=70000" in words else ["--port=0"])])
    error = capsys.readouterr().err
    assert (ended.value.code, message in error, error.count("\n")) == (2, True, 1), error


def test_without_its_packages_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        serve.main(["--ckpt=x.ckpt"])
    assert "serving needs python -m pip install 'octvideo[serve]': import of uvicorn" in capsys.readouterr().err


def test_other_onnx_files_and_taken_ports_are_refused(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="pip install 'octvideo[export]'")
    (tmp_path / "x.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"x\.onnx: not an ONNX file of octvideo export"):
        of_onnx(tmp_path / "x.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        serve.main([f"--onnx={tmp_path / 'x.onnx'}", f"--port={taken.getsockname()[1]}"])
    assert "Address already in use" in capsys.readouterr().err


def answering(folder):
    """The address that a server printed."""
    for _ in range(600):
        printed = (folder / "stdout").read_text() if (folder / "stdout").exists() else ""
        if printed.startswith("http"):
            return printed.split()[0]
        time.sleep(0.1)
    raise AssertionError((folder / "stderr").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--ckpt", long("--onnx")])
def test_the_command_serves_a_checkpoint_and_ends_when_all_is_answered(kind, trained, motions, tmp_path):
    model = trained / "checkpoints" / "last.ckpt"
    if kind == "--onnx":
        pytest.importorskip("onnxscript", reason="pip install 'octvideo[export]'")
        model = tmp_path / "network.onnx"
        exported = run_tool("export.py", f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}", f"--output={model}")
        assert exported.returncode == 0, exported.stderr
    process = start_tool("serve.py", [f"{kind}={model}", "--port=0", "--clips=3"], tmp_path)
    address, videos = answering(tmp_path), sorted((motions / "val").glob("*.mp4"))[:4]
    health = httpx.get(f"{address}/health").json()
    assert (health["network"], health["alpha"], len(health["labels"])) == ("i3d_r50", 0.5, 8)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda video: httpx.post(f"{address}/predict", content=video.read_bytes()), videos))
        for video, answer in zip(videos, answers, strict=True):
            wanted = predict(trained / "checkpoints" / "last.ckpt", video, num_clips=3, num_crops=1).top(5)
            found = json.loads(answer.text)["top"]
            assert [one["label"] for one in found] == [one.label for one in wanted]
            np.testing.assert_allclose(
                [one["probability"] for one in found], [one.probability for one in wanted], atol=1e-4
            )
        last = pool.submit(httpx.post, f"{address}/predict", content=videos[0].read_bytes())
        time.sleep(0.05)
        process.terminate()
        assert last.result().status_code == 200
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
