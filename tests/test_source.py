"""Where videos come from: folders of frames, spans, stores, tar files, rows of data sets, a user's own source."""

import io
import multiprocessing
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import frame_numbers, write_video
from PIL import Image

from octvideo import stores
from octvideo.data import source
from octvideo.data.clips import Draw
from octvideo.data.index import IndexedVideo, write_index
from octvideo.data.lists import read_list
from octvideo.data.module import VideoData
from octvideo.data.source import AnySource, Cache, LocalFile, Source, frames_of, members, split_span
from octvideo.data.video import Video
from octvideo.errors import DecodeError, ListError, StoreError, UserError

TIMES = (np.arange(60) + 0.5) / 30


def frames(path, times=TIMES, side=None, **options):
    """Frames of a video at times in seconds."""
    with Video(path, **options) as video:
        return video.frames_at(times, side)


def serve(handler):
    """The address of a web server, which ends with this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(scope="module")
def textured(tmp_path_factory):
    """A video of 60 frames at 30 fps, 64 x 48, with noise that no two frames share."""
    path = tmp_path_factory.mktemp("textured") / "v.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8), 30)
    return path


@pytest.mark.parametrize("name", ["{:06d}.png", "image_{}.png", "img_{:05d}.PNG"])
def test_a_folder_of_frames_gives_the_frames_of_the_video_that_it_was_made_from(textured, tmp_path, name):
    for number, image in enumerate(frames(textured), 8):
        Image.fromarray(image).save(tmp_path / name.format(number))
    (tmp_path / "flow_x_00008.png").touch()
    (tmp_path / "cover.jpg").touch()
    times = [1.99, 0.0, 0.52, 0.52, 7.0, 1 / 3]
    assert (frames(tmp_path, times, source=AnySource(30)) == frames(textured, [*times[:4], 1.99, 1 / 3])).all()
    with Video(tmp_path, source=AnySource(12)) as video:
        assert (video.fps, video.duration_seconds, video.num_frames, video.backend) == (12, 5, 60, "pictures")
        assert video.frames_at([0], 24).shape == (1, 24, 32, 3)
        assert video.frames_decoded == 1


def test_frames_that_are_missing_mixed_or_no_pictures_are_named(tmp_path):
    with pytest.raises(DecodeError, match="a folder without numbered pictures"):
        Video(tmp_path)
    assert frames_of("f", ["a10.jpg", "a2.jpg", "a6.jpg"]) == ["a2.jpg", "a6.jpg", "a10.jpg"]  # every fourth
    with pytest.raises(DecodeError, match=r"^f: frames are missing after a3.jpg$"):
        frames_of("f", ["a1.jpg", "a2.jpg", "a3.jpg", "a5.jpg"])
    with pytest.raises(DecodeError, match=r"^f: a folder of several kinds of frames: a\*.jpg, b\*.jpg$"):
        frames_of("f", ["a1.jpg", "b1.jpg"])
    (tmp_path / "a1.jpg").write_bytes(b"no picture")
    with pytest.raises(DecodeError, match=f"^{tmp_path}/a1.jpg: cannot identify image file"):
        frames(tmp_path, [0])


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
@pytest.mark.parametrize(("span", "first", "count"), [("#t=0.5,1.25", 15, 23), ("#t=1", 30, 30), ("#t=,0.1", 0, 3)])
def test_a_span_gives_the_frames_of_its_video_and_no_others(numbered_video, backend, span, first, count):
    if backend == "torchcodec":
        pytest.importorskip("torchcodec.decoders", reason="torchcodec or FFmpeg's libraries are missing")
    with Video(f"{numbered_video}{span}", backend) as video:
        assert video.num_frames == pytest.approx(count, abs=1)
        assert frame_numbers(video.frames_at(TIMES[:count])) == list(range(first, first + count))
        assert frame_numbers(video.frames_at([-1, 99])) == [first, first + count - 1]


def test_spans_of_one_video_decode_their_part_alone(tmp_path):
    path = tmp_path / "long.mp4"
    write_video(path, np.zeros((900, 48, 64, 3), np.uint8), 30)
    with Video(f"{path}#t=20,21") as video:
        video.frames_at(TIMES[:30])
        assert video.frames_decoded <= 30 + 12


def test_spans_that_hold_nothing_and_files_called_like_one(numbered_video, tmp_path):
    with pytest.raises(DecodeError, match=r"the span starts at 2.50 s, and the video ends after 2.00 s$"):
        Video(f"{numbered_video}#t=2.5,3")
    with pytest.raises(DecodeError, match=r"the span starts at 1.00 s, and it ends at 0.50 s$"):
        Video(f"{numbered_video}#t=1,0.5")
    odd = tmp_path / "a.mp4#t=1,2"
    odd.symlink_to(numbered_video)
    assert split_span(str(odd)) == (str(odd), 0.0, None)
    assert split_span("a.mp4#t=") == ("a.mp4#t=", 0.0, None)


def test_lines_of_a_list_may_end_with_a_span(tmp_path):
    (tmp_path / "list.txt").write_text("a b.mp4 3 12.5 20\nrun 1 2 3\nc.mkv 4\nd.avi#t=1,2 5\ns3://x/e.mp4 6 0 1\n")
    listed = read_list(tmp_path / "list.txt", root="/r")
    assert list(listed.paths) == [
        *("/r/a b.mp4#t=12.5,20", "/r/run 1 2", "/r/c.mkv", "/r/d.avi#t=1,2", "s3://x/e.mp4#t=0,1"),
    ]
    assert listed.labels.tolist() == [3, 3, 4, 5, 6]


def pack(path, *files):
    """Writes a tar of (name, content)."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_tar_files_of_webdatasets_layout_are_lists_of_their_videos(numbered_video, textured, tmp_path):
    one, two = numbered_video.read_bytes(), textured.read_bytes()
    pack(tmp_path / "t-00.tar", ("c/a.mp4", one), ("c/a.cls", b"2\n"), ("b.mp4", two), ("b.json", b'{"cls": 1}'))
    pack(tmp_path / "t-01.tar", ("x.txt", b"a"), ("x.cls", b"0"), ("x.mp4", one))
    listed = read_list(str(tmp_path / "t-{00..01}.tar"))
    assert listed.labels.tolist() == [2, 1, 0]
    assert listed.paths[0] == f"tar://c/a.mp4::{tmp_path}/t-00.tar#bytes=512,{len(one)}"
    assert (frames(listed.paths[1]) == frames(textured)).all()
    assert frame_numbers(frames(f"tar://x.mp4::{tmp_path}/t-01.tar")) == list(range(60))
    assert frame_numbers(frames(f"{listed.paths[0]}#t=1,2", TIMES[:30])) == list(range(30, 60))
    assert list(read_list(str(tmp_path / "t-0?.tar"), root="/other").paths) == list(listed.paths)


def test_tar_files_that_have_changed_or_are_none(numbered_video, tmp_path):
    pack(tmp_path / "t.tar", ("a.mp4", numbered_video.read_bytes()), ("a.cls", b"0"), ("b.mp4", b""))
    entry = f"tar://a.mp4::{tmp_path}/t.tar#bytes=512,{numbered_video.stat().st_size}"
    pack(tmp_path / "t.tar", ("other.mp4", b"x" * 100_000))
    with pytest.raises(DecodeError, match=r"t\.tar has changed: another member is there"):
        Video(entry)
    members.cache_clear()
    with pytest.raises(DecodeError, match=r"t\.tar has no such member"):
        Video(f"tar://a.mp4::{tmp_path}/t.tar")
    with pytest.raises(DecodeError, match="No such file or directory"):
        Video(f"tar://a.mp4::{tmp_path}/none.tar")
    (tmp_path / "no.tar").write_bytes(b"nothing" * 1000)
    with pytest.raises(DecodeError, match="not an uncompressed tar file"):
        read_list(tmp_path / "no.tar")


def test_a_data_set_of_hugging_face_is_a_list(numbered_video, textured, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    features = datasets.Features({"clip": datasets.Video(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"clip": [str(numbered_video), {"bytes": textured.read_bytes(), "path": None}], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    listed = read_list(f"hf://{tmp_path / 'saved'}")
    assert (listed.labels.tolist(), listed.paths[1]) == ([1, 0], f"hf://{tmp_path / 'saved'}?row=1")
    assert frame_numbers(frames(listed.paths[0])) == list(range(60))
    assert (frames(listed.paths[1]) == frames(textured)).all()
    for name in ("train", "val"):
        for label in ("x", "y"):
            (tmp_path / "folder" / name / label).mkdir(parents=True)
            (tmp_path / "folder" / name / label / f"{name}.mp4").write_bytes(numbered_video.read_bytes())
    listed = read_list(f"hf://{tmp_path / 'folder'}?split=validation")
    assert frame_numbers(frames(listed.paths[0], [0.51])) == [15]
    with pytest.raises(UserError, match=r"^hf:///nothing/there cannot be loaded: "):
        read_list("hf:///nothing/there")


class Doubled(Source):
    """A source of a user: entries name files without their folder and ending."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find(self, name, known=None):
        return LocalFile(f"{self.folder}/{name}.mp4", known)


def test_a_class_of_the_users_finds_videos(textured, tmp_path):
    (tmp_path / "list.csv").write_text("v 0\n" * 4)
    data = VideoData(
        str(tmp_path / "list.csv"), source=Doubled(str(textured.parent)), batch_size=2, num_workers=1, frame_stride=1
    )
    batch = next(iter(data.train_dataloader()))
    assert (batch.clips.shape[0], batch.bad) == (2, [])


def test_videos_in_a_store_are_those_on_this_machine(s3, numbered_video, textured, tmp_path):
    stores.put(textured, f"{s3}/a/v.mp4")
    assert (frames(f"{s3}/a/v.mp4") == frames(textured)).all()
    assert (frames(f"{s3}/a/v.mp4#t=1,2", TIMES[:30]) == frames(textured)[30:]).all()
    for number, image in enumerate(frames(textured)[:4]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        stores.put(tmp_path / f"{number}.png", f"{s3}/frames/1/{number}.png")
    assert (frames(f"{s3}/frames/1", TIMES[:4], source=AnySource(30)) == frames(textured)[:4]).all()
    pack(tmp_path / "t.tar", ("a.mp4", numbered_video.read_bytes()), ("a.cls", b"0"))
    stores.put(tmp_path / "t.tar", f"{s3}/t.tar")
    stores.take_traffic()
    (entry,) = read_list(f"{s3}/t.tar").paths
    assert frame_numbers(frames(entry)) == list(range(60))
    assert stores.take_traffic().requests == 3  # size and headers of the tar, then the clip
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(textured, "v.mp4")
    stores.put(tmp_path / "z.zip", f"{s3}/z.zip")
    assert (frames(f"zip://v.mp4::{s3}/z.zip") == frames(textured)).all()
    with pytest.raises(DecodeError, match=f"^{s3}/none.mp4: No such file or directory$"):
        Video(f"{s3}/none.mp4")


def test_folders_of_frames_in_a_store_train_whatever_their_names(s3, textured, tmp_path):
    for number, image in enumerate(frames(textured)[:8]):
        Image.fromarray(image).save(tmp_path / "a.png")
        stores.put(tmp_path / "a.png", f"{s3}/clip.001/{number}.png")
    (tmp_path / "list.csv").write_text("clip.001 0\n" * 2)
    how = {"root": s3, "frame_stride": 1, "num_workers": 0, "batch_size": 2, "crop_size": 32, "short_side": (32, 32)}
    data = VideoData(str(tmp_path / "list.csv"), **how)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).bad == []


def test_tar_files_of_every_format_are_read(numbered_video, tmp_path):
    content = numbered_video.read_bytes()
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        name = "häuser.mp4" if kind == tarfile.PAX_FORMAT else f"{'x' * 80}/{'y' * 60}.mp4"
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=kind) as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
            label = tarfile.TarInfo(f"{name.removesuffix('.mp4')}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"1"))
        (path,) = read_list(str(tmp_path / f"{kind}.tar")).paths
        assert frame_numbers(frames(path, [1.01])) == [30]


def test_the_next_video_is_read_ahead_and_what_nobody_asks_for_is_let_go(s3, textured, tmp_path):
    write_index(tmp_path, {f"{n}.mp4": IndexedVideo(60, 30.0, 2.0, np.arange(5) * 0.4, 0) for n in range(3)})
    size = textured.stat().st_size
    known = {f"{n}.mp4": IndexedVideo(60, 30.0, 2.0, np.arange(5) * 0.4, size) for n in range(3)}
    write_index(tmp_path, known)
    (tmp_path / "list.csv").write_text("".join(f"{n}.mp4 {n}\n" for n in range(3)))
    for n in range(3):
        stores.put(textured, f"{s3}/{n}.mp4")
    how = {"root": s3, "frame_stride": 1, "num_workers": 0, "decode_timeout_seconds": None}
    clips = VideoData(str(tmp_path / "list.csv"), **how, batch_size=3).train_dataloader().dataset
    stores.take_traffic()
    samples = clips.__getitems__([Draw(0, n, n) for n in range(3)])
    assert [sample.traffic.requests for sample in samples] == [1, 1, 1]
    assert [sample.label for sample in samples] == [0, 1, 2]
    assert not stores._ahead
    for start in range(stores.MOST_AHEAD + 2):
        stores.read_ahead(f"{s3}/0.mp4", start, 100)
        stores.read_ahead(f"{s3}/0.mp4", start, 100)
    assert len(stores._ahead) == stores.MOST_AHEAD
    assert stores.read(f"{s3}/0.mp4", 5, 100) == textured.read_bytes()[5:100]
    stores._ahead.clear()


def test_a_range_behind_the_end_and_what_is_gone_are_no_faults_of_the_store(s3, tmp_path):
    (tmp_path / "empty").touch()
    stores.put(tmp_path / "empty", f"{s3}/empty.mp4")
    assert stores.read(f"{s3}/empty.mp4", 0, 100) == b""
    with pytest.raises(DecodeError, match=f"^{s3}/empty.mp4: "):
        Video(f"{s3}/empty.mp4", known=IndexedVideo(60, 30.0, 2.0, np.empty(0), 1000))

    class Gone(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403 if "secret" in self.path else 410)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    address = serve(Gone)
    with pytest.raises(FileNotFoundError):
        stores.read(f"{address}/v.mp4", 0, 10)
    with pytest.raises(DecodeError, match=r"secret.mp4: Permission denied$"):
        Video(f"{address}/secret.mp4")


def test_a_known_video_is_one_request_and_a_changed_one_is_seen(s3, textured, numbered_video):
    stores.put(textured, f"{s3}/v.mp4")
    known = IndexedVideo(60, 30.0, 2.0, np.arange(5) * 0.4, textured.stat().st_size)
    stores.take_traffic()
    frames(f"{s3}/v.mp4", [1.0], known=known)
    assert stores.take_traffic()[:3] == (s3, 1, 0)
    stores.put(numbered_video, f"{s3}/v.mp4")
    wrong = known._replace(duration_seconds=99.0)
    with Video(f"{s3}/v.mp4", known=wrong) as video:
        assert video.duration_seconds == 2


def test_parts_of_a_large_file_are_read_once(s3, textured, monkeypatch):
    monkeypatch.setattr(source, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(source, "PART_BYTES", 20_000)
    stores.put(textured, f"{s3}/v.mp4")
    stores.take_traffic()
    assert (frames(f"{s3}/v.mp4", [0.1]) == frames(textured, [0.1])).all()
    traffic = stores.take_traffic()
    assert traffic.bytes < 0.6 * textured.stat().st_size
    assert traffic.requests <= 2 + textured.stat().st_size / 20_000


def test_lists_indices_and_names_of_classes_may_be_in_a_store(s3, textured, tmp_path):
    stores.put(textured, f"{s3}/videos/v.mp4")
    write_index(tmp_path, {"v.mp4": IndexedVideo(60, 30.0, 2.0, np.arange(5) * 0.4, textured.stat().st_size)})
    for name, text in (("train.csv", "v.mp4 1\nv.mp4 0\nnone.mp4 0\n"), ("labels.txt", "x\ny\n")):
        (tmp_path / name).write_text(text)
    for name in ("train.csv", "labels.txt", "index.bin"):
        stores.put(tmp_path / name, f"{s3}/{name}")
    workers = int(multiprocessing.get_start_method() == "fork")  # a fork server knows the environment it began with
    how = {"root": f"{s3}/videos", "frame_stride": 1, "num_workers": workers, "batch_size": 3, "num_classes": 2}
    data = VideoData(f"{s3}/train.csv", f"{s3}/train.csv", **how)
    assert data.labels == ["x", "y"]
    batch = next(iter(data.train_dataloader()))
    assert {bad.reason for bad in batch.bad} == {"No such file or directory"}
    assert (batch.traffic.store, batch.traffic.retries) == (s3, 0)
    assert batch.traffic.requests >= 3
    tested = list(data.val_dataloader())
    assert sum(len(batch.paths) for batch in tested) == 2


def test_stores_that_cannot_be_used_end_the_start_in_a_line(s3, tmp_path, monkeypatch):
    (tmp_path / "list.csv").write_text("s3://octvideo-has-no-such-bucket/v.mp4 0\n")
    with pytest.raises(StoreError, match=r"^s3://octvideo-has-no-such-bucket does not exist, or these credentials"):
        VideoData(str(tmp_path / "list.csv")).setup("fit")
    with pytest.raises(ListError, match=f"^{s3}/none.csv: No such file"):
        VideoData(f"{s3}/none.csv").read("train_list")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    stores._file_system(s3)[0].clear_instance_cache()
    with pytest.raises(StoreError, match="credentials"):
        stores.check(f"{s3}/v.mp4")


def test_failures_of_the_network_are_tried_again_and_counted(numbered_video):
    calls = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            status = 503 if len(calls) % 3 else 404 if "none" in self.path else 200
            content = numbered_video.read_bytes() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    address = serve(Failing)
    stores.take_traffic()
    assert len(stores.read(f"{address}/v.mp4")) == numbered_video.stat().st_size
    assert stores.take_traffic()[:4] == (address, 3, 2, numbered_video.stat().st_size)
    with pytest.raises(FileNotFoundError):
        stores.read(f"{address}/none.mp4")


def test_a_request_that_hangs_is_given_up_and_repeated(monkeypatch):
    monkeypatch.setattr(stores, "TIMEOUT_SECONDS", 0.5)
    calls, waits = [], []
    monkeypatch.setattr(stores, "on_wait", lambda: waits.append(0))

    class Hanging(SimpleHTTPRequestHandler):
        def do_GET(self):
            calls.append(0)
            if len(calls) == 1:
                time.sleep(30)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"content")

        def log_message(self, *_):
            pass

    assert stores.read(f"{serve(Hanging)}/v", 0, 7) == b"content"
    assert (len(calls), len(waits) > 1) == (2, True)


def test_errors_of_stores_are_the_networks_or_last():
    exceptions = pytest.importorskip("botocore.exceptions", reason="pip install s3fs")
    from s3fs.errors import translate_boto_error

    def of_s3(code, status):
        about = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return translate_boto_error(exceptions.ClientError(about, "GetObject"))

    names = ("ReadTimeoutError", "ConnectTimeoutError", "EndpointConnectionError", "ConnectionClosedError")
    lost = [translate_boto_error(getattr(exceptions, name)(endpoint_url="u")) for name in names]
    lost += [of_s3("SlowDown", 503), of_s3("InternalError", 500), of_s3("RequestTimeout", 408), TimeoutError()]
    lost += [ConnectionResetError(), OSError(110, "timed out")]
    last = [of_s3("AccessDenied", 403), of_s3("NoSuchKey", 404), of_s3("InvalidRange", 416), of_s3("Odd", 400)]
    last += [exceptions.NoCredentialsError(), exceptions.ProfileNotFound(profile="p"), OSError("forbidden")]
    last += [FileNotFoundError(), PermissionError(), ValueError()]
    assert [stores._is_transient(error) for error in lost] == [True] * len(lost)
    assert [stores._is_transient(error) for error in last] == [False] * len(last)


def test_a_lost_store_is_no_bad_video(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "START_PATIENCE_SECONDS", 0.2)
    (tmp_path / "list.csv").write_text("http://127.0.0.1:9/v.mp4 0\n" * 2)
    data = VideoData(str(tmp_path / "list.csv"), batch_size=2, num_workers=0, decode_timeout_seconds=None)
    with pytest.raises(StoreError, match=r"^http://127.0.0.1:9 cannot be used: \d requests in \d s failed"):
        next(iter(data.train_dataloader()))


def test_a_package_that_a_store_needs_is_named():
    code = "import sys; sys.modules['s3fs'] = None\nfrom octvideo import stores\nstores.read('s3://b/v')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "s3://b/v: s3:// needs another package: pip install 'octvideo[s3]'" in done.stderr


def test_a_cache_keeps_its_bound_among_processes_and_what_was_used_last(tmp_path):
    cache = Cache(tmp_path, 100_000)
    for number in range(40):
        cache.put(number, bytes([number]) * 10_000)
        assert cache.get(0, 10_000) is not None  # used: it stays
        time.sleep(0.002)
        held = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        assert held <= 110_000
    again = Cache(tmp_path, 100_000)
    assert again.get(39, 10_000) == bytes([39]) * 10_000
    assert again.get(3, 10_000) is None
    next(file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size).write_bytes(b"torn")
    assert sum(again.get(number, 10_000) is not None for number in range(40)) >= 6


def test_what_was_read_from_a_store_is_kept_on_this_machine(s3, textured, tmp_path):
    stores.put(textured, f"{s3}/v.mp4")
    first = frames(f"{s3}/v.mp4", source=AnySource(cache=str(tmp_path)))
    stores.take_traffic()
    assert (frames(f"{s3}/v.mp4", source=AnySource(cache=str(tmp_path))) == first).all()
    assert stores.take_traffic().bytes == 0
    for wrong in ({"frames_fps": 0}, {"cache": str(tmp_path), "cache_gb": -1}):
        with pytest.raises(UserError, match=r"^data\.(frames_fps|cache_gb) must be positive, got"):
            VideoData(**wrong)


def test_a_mirror_is_what_the_store_has(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTVIDEO_CACHE", str(tmp_path / "one"))
    mirror = stores.Mirror(f"{s3}/run/")
    mirror.fetch()
    folder = mirror.folder / "checkpoints"
    folder.mkdir()
    (folder / "step_1.ckpt").write_bytes(b"1" * 100)
    (folder / "last.ckpt").symlink_to("step_1.ckpt")
    os.link(folder / "step_1.ckpt", folder / "best.ckpt")
    (folder / "step_2.ckpt.tmp").write_bytes(b"torn")
    stores.take_traffic()
    mirror.push()
    assert stores.take_traffic().bytes == 0
    names = {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/step_1.ckpt"}
    assert stores.files_below(f"{s3}/run").keys() == names
    assert stores.read(f"{s3}/run/checkpoints/last.ckpt") == b"1" * 100
    monkeypatch.setenv("OCTVIDEO_CACHE", str(tmp_path / "two"))  # another machine
    other = stores.Mirror(f"{s3}/run")
    other.fetch()
    there = other.folder / "checkpoints"
    assert sorted(path.name for path in there.iterdir()) == ["best.ckpt", "step_1.ckpt"]
    (there / "step_2.ckpt").write_bytes(b"2" * 100)
    (there / "step_1.ckpt").unlink()
    other.push()
    (folder / "step_0.ckpt").write_bytes(b"0")  # of no use to anyone
    (folder / "step_3.ckpt").write_bytes(b"3")  # the store did not answer: the run goes on from here
    mirror.fetch()
    kept = {path.name for path in folder.iterdir() if path.suffix == ".ckpt" and not path.is_symlink()}
    assert kept == {"best.ckpt", "step_2.ckpt", "step_3.ckpt"}
    code = f"from octvideo.files import lock; from pathlib import Path\nheld = lock(Path({str(folder)!r}, '.lock'))\n"
    code += "print('locked', flush=True); input()"
    other_run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other_run.stdout.readline()
    with pytest.raises(UserError, match=f"^another run is writing to {s3}/run: choose another folder"):
        mirror.fetch()
    other_run.communicate(b"\n")


def test_a_checkpoint_may_be_in_a_store(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTVIDEO_CACHE", str(tmp_path))
    (tmp_path / "file").write_text("a")
    stores.put(tmp_path / "file", f"{s3}/file")
    assert stores.local(f"{s3}/file").read_text() == "a"
    (tmp_path / "file").write_text("other")
    stores.put(tmp_path / "file", f"{s3}/file")
    assert stores.local(f"{s3}/file").read_text() == "other"
    assert stores.local(tmp_path / "file") == tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        stores.local(f"{s3}/none")
