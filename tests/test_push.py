"""Published networks: the folder and what reads it, the hub by way of a stand-in server, and mistakes."""

import base64
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_tool, small
from huggingface_hub import constants
from safetensors.torch import load_file

import octvideo
from octvideo.commands import options as command_options
from octvideo.commands import push
from octvideo.evaluation.report import Accuracy
from octvideo.files import appearing_folder
from octvideo.models.checkpoint import load_trained
from octvideo.models.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of a test of 4 videos of eight classes, 3 of them right, and a bad one."""
    folder = tmp_path_factory.mktemp("results")
    scores = np.eye(8)[[0, 1, 2, 4]].tolist()
    videos = [
        {"path": f"{k}.mp4", "label": k, "scores": row, "clip_top1": 0.5, "clip_top5": 1.0}
        for k, row in enumerate(scores)
    ]
    bad = [{"path": "bad.mp4", "reason": "broken"}]
    found = {"top1": 0.75, "top5": 1.0, "clip_top1": 0.5, "clip_top5": 1.0, "videos": videos, "bad": bad}
    (folder / "predictions.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint, results, tmp_path_factory):
    """The published folder of a trained network."""
    folder = tmp_path_factory.mktemp("published") / "movements"
    push.main([f"--ckpt={checkpoint}", f"--to={folder}", f"--report={results}", "--data=Made videos.", "--license=mit"])
    return folder


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the command in this process; gives its exit status and what it printed."""

    def run(*options):
        monkeypatch.setattr(command_options, "program", "octvideo push")
        try:
            status = push.main([*map(str, options)]) or 0
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def logits(network):
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(clips)


def test_a_folder_is_the_checkpoint_without_a_pickle(folder, checkpoint):
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # whoever may read one may read all
    wanted, found = load_trained(checkpoint), load_trained(folder)
    assert (found.options, found.labels, found.preprocessing) == (wanted.options, wanted.labels, wanted.preprocessing)
    assert torch.equal(logits(found.network), logits(wanted.network))
    assert not found.network.training
    config = json.loads((folder / "config.json").read_text())
    assert config["options"] == wanted.options
    assert config["octvideo_version"] == importlib.metadata.version("octvideo")
    tensors, state = load_file(folder / "model.safetensors"), wanted.network.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_the_card_has_the_figures_and_the_metadata_of_the_hub(folder, checkpoint):
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert (metadata["library_name"], metadata["pipeline_tag"], metadata["license"]) == (
        *("octvideo", "video-classification"),
        "mit",
    )
    (result,) = metadata["model-index"][0]["results"]
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {"video top1": 0.75, "video top5": 1.0}
    trained = load_trained(checkpoint)
    parameters = sum(parameter.numel() for parameter in trained.network.parameters())
    gmacs = octvideo.models.cost.count_macs(trained.network, (3, 4, 32, 32)) / 1e9
    for line in (
        "# movements",
        f"| parameters | {parameters:,} |",
        f"| multiply-adds of a clip | {gmacs:.3f} G |",
        "| alpha (share of channels at half the resolution) | 0.5 |",
        "| clip top-1 | 50.00 % (50.00 to 50.00 %) |",
        "Made videos.",
        "Its training ended in epoch 2, after 8 steps.",
        'print(octvideo.predict("movements", "video.mp4").top(5))',
        *(f"{number}. {label}" for number, label in enumerate(trained.labels)),
    ):
        assert f"\n{line}\n" in text, line
    assert re.search(r"\| video top-1 \| 75\.00 % \(\d+\.\d\d to 100\.00 %\) \|\n", text)
    assert "those of 4 test videos (1 more could not be decoded)" in text
    assert "\n\n\n" not in text
    assert push.percent(Accuracy(0.5)) == "50.00 %"


def test_create_model_and_weights_read_a_folder(folder, checkpoint):
    trained = load_trained(checkpoint)
    torch.testing.assert_close(logits(octvideo.create_model(str(folder))), logits(trained.network))
    vanilla = load_trained(checkpoint, alpha=0)
    torch.testing.assert_close(logits(octvideo.create_model(str(folder), alpha=0)), logits(vanilla.network))
    with pytest.raises(ValueError, match="is published: it takes no option but alpha, got num_classes, width"):
        octvideo.create_model(str(folder), num_classes=3, width=8)
    other = octvideo.create_model("i3d_r50", alpha=0.5, num_classes=8, width=8)
    report = load_weights(other, folder)
    assert not report.missing
    assert not report.skipped
    torch.testing.assert_close(logits(other.eval()), logits(trained.network), atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_commands_take_a_folder_as_a_checkpoint(folder, checkpoint, motions, tmp_path):
    tested = []
    for number, ckpt in enumerate((checkpoint, folder)):
        output = tmp_path / str(number)
        options = [*small(motions, tmp_path), f"--ckpt={ckpt}", f"--output={output}", "--data.test_clips=1", "--report"]
        finished = run_tool("test_net.py", *options, "--data.test_crops=1", f"--data.test_list={motions / 'val.csv'}")
        assert finished.returncode == 0, finished.stderr
        tested.append(json.loads((output / "predictions.json").read_text()))
        assert "cannot be read" not in (output / "report.html").read_text()
    np.testing.assert_allclose(*([video["scores"] for video in one["videos"]] for one in tested), atol=1e-6)
    assert tested[0]["labels"] == tested[1]["labels"]
    video = next((motions / "val").glob("*.mp4"))
    wanted, found = (octvideo.predict(ckpt, video, num_clips=1, num_crops=1) for ckpt in (checkpoint, folder))
    np.testing.assert_array_equal(found.scores, wanted.scores)
    assert found.labels == wanted.labels
    rows = [octvideo.features(ckpt, video, num_clips=1, num_crops=1).features for ckpt in (checkpoint, str(folder))]
    np.testing.assert_array_equal(*rows)
    finished = run_tool(
        "export.py", "--ckpt", folder, "--output", tmp_path / "network.pt2", "--free=none", "--rounds=1"
    )
    assert finished.returncode == 0, finished.stderr


def test_publishing_again_changes_nothing_and_other_content_is_kept(run_here, folder, checkpoint, results, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "movements")
    options = (f"--ckpt={checkpoint}", f"--to={copy}", "--data=Made videos.", "--license=mit", f"--report={results}")
    assert run_here(*options)[0] == 0
    (copy / "README.md").write_text("edited")
    status, _, error = run_here(*options)
    assert (status, error.count("\n")) == (2, 1)
    assert f"{copy} exists and holds something else: name another folder, or remove it" in error
    assert (copy / "README.md").read_text() == "edited"
    assert os.listdir(tmp_path) == ["movements"]


def test_an_untested_network_says_so_and_a_folder_can_be_published_again(run_here, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run_here(f"--ckpt={folder}", f"--to={tmp_path / 'empty'}") == (0, f"published: {tmp_path / 'empty'}\n", "")
    text = (tmp_path / "empty" / "README.md").read_text()
    assert "It has not been tested." in text
    assert "top-1" not in text
    assert "model-index" not in text
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "empty" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fails():
        with appearing_folder(tmp_path / "a" / "b") as partial:
            (partial / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert os.listdir(tmp_path / "a") == []
    with appearing_folder(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("whole")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "whole"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_folders_that_are_no_published_network_are_one_line(folder, tmp_path):
    def broken(name, content, missing=()):
        copy = shutil.copytree(folder, tmp_path / name)
        for file, text in content.items():
            (copy / file).write_text(text)
        for file in missing:
            (copy / file).unlink()
        return copy

    config = json.loads((folder / "config.json").read_text())
    other = config | {"options": config["options"] | {"width": 16}}
    strange = config | {"preprocessing": config["preprocessing"] | {"rotate": 90}}
    for copy, message in (
        (
            broken("a", {}, ["config.json"]),
            r"a: a folder without config.json; expected a checkpoint of octvideo train, or a folder of octvideo push",
        ),
        (broken("b", {}, ["model.safetensors"]), r"b: a folder without model.safetensors"),
        (broken("c", {"config.json": "{"}), r"c/config.json: not written by octvideo push: Expecting property name"),
        (broken("d", {"config.json": "{}"}), r"d/config.json: not written by octvideo push: it has no 'options'"),
        (broken("e", {"model.safetensors": "torn"}), r"e/model.safetensors: damaged: "),
        (broken("f", {"config.json": json.dumps(other)}), r"f: its weights do not fit the i3d_r50"),
        (broken("g", {"config.json": json.dumps(strange)}), r"preprocessing must be of .*, got rotate"),
        (
            broken("h", {"config.json": json.dumps(config | {"options": {"name": "i3d_r50", "x": 1}})}),
            r"does not know: .*'x'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_trained(copy)
    with pytest.raises(ValueError, match="no model 'i3d'; there are"):
        octvideo.create_model("i3d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to={folder}/x"], "the following arguments are required: --ckpt"),
        (["--ckpt={ckpt}"], "--to FOLDER is needed, unless --ckpt is a folder and --hub says where it goes"),
        (["--ckpt={ckpt}", "--hub=user/name"], "--to FOLDER is needed"),
        (["--ckpt={ckpt}", "--to={folder}/x", "--hub=name"], "--hub must be USER/NAME, got name"),
        (["--ckpt=missing.ckpt", "--to={folder}/x"], "No such file or directory: 'missing.ckpt'"),
        (["--ckpt={ckpt}", "--to={folder}/x", "--report={folder}"], "{folder}/predictions.json"),
        (["--ckpt={ckpt}", "--to={folder}/x", "--report={folder}/torn.json"], "{folder}/torn.json: Expecting"),
        (["--ckpt={ckpt}", "--to={folder}/x", "--report={folder}/other.json"], "cannot be read: KeyError: 'videos'"),
        (["--ckpt={ckpt}", "--to={folder}/x", "--report={folder}/none.json"], "none.json: no video was tested"),
        (["--ckpt={folder}/bare.ckpt", "--to={folder}/x"], "bare.ckpt: cannot be read: KeyError: 'epoch'"),
        (["--ckpt={ckpt}", "--to={folder}/torn.json"], "torn.json"),
    ],
)
def test_mistakes_in_the_command_are_one_line_each(run_here, checkpoint, tmp_path, options, message):
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "none.json").write_text('{"videos": [], "bad": []}')
    content = torch.load(checkpoint)
    del content["epoch"]
    torch.save(content, tmp_path / "bare.ckpt")
    names = {"folder": str(tmp_path), "ckpt": str(checkpoint)}
    status, printed, error = run_here(*(option.format(**names) for option in options))
    assert (status, printed) == (2, ""), error
    assert error.startswith("octvideo push: error: ")
    assert message.format(**names) in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["bare.ckpt", "none.json", "other.json", "torn.json"]


def test_publishing_and_the_hub_need_a_package_and_published_folders_do_not(
    folder, checkpoint, monkeypatch, run_here, tmp_path
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else found(name))
    assert load_trained(folder).labels
    with pytest.raises(ValueError, match=r"need huggingface_hub: pip install 'octvideo\[hub\]'"):
        load_trained("user/name")
    status, _, error = run_here(f"--ckpt={checkpoint}", f"--to={tmp_path / 'x'}")
    assert (status, error.count("\n")) == (2, 1)
    assert "need huggingface_hub: pip install" in error


class Hub(BaseHTTPRequestHandler):
    """The requests of huggingface_hub that uploading and downloading a model takes; repositories live in memory.

    All files are small here: large ones would go to a store that hf_xet, a binary, talks to.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        content = json.dumps(content).encode() if isinstance(content, list | dict) else content
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def refuse(self, status, code, message):
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def do_POST(self):
        content, repositories = self.body(), self.server.repositories
        if self.headers.get("Authorization") != "Bearer secret":
            return self.refuse(401, "", "Invalid username or password.")
        if self.path == "/api/repos/create":
            given = json.loads(content)
            name = f"{given['organization']}/{given['name']}"
            self.server.created.append(given)
            status = 409 if name in repositories else 200
            repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "name": name}, status)
        if self.path == "/api/validate-yaml":  # of a model card
            return self.answer({"errors": [], "warnings": []})
        name = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)[1]
        if self.path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": modes})
        assert self.path.endswith("/commit/main")
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = hashlib.sha1(content).hexdigest()
        return self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}"}
        )

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            _, _, _, user, name, *rest = self.path.split("?")[0].split("/")
            files = self.server.repositories.get(f"{user}/{name}")
            if name == "asking":
                return self.refuse(403, "GatedRepo", "Access to it is restricted.")
            if files is None:
                return self.refuse(401, "RepoNotFound", "Repository not found")
            if rest[0] == "tree":
                oids = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
                return self.answer(
                    [{"type": "file", "path": path, "size": len(files[path]), "oid": oid} for path, oid in oids.items()]
                )
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": f"{user}/{name}", "sha": SHA, "siblings": siblings, "tags": [], "downloads": 0})
        if not (found := re.fullmatch(r"/(.+?/.+?)/resolve/(.+?)/(.+)", self.path)):
            return self.answer(status=404)
        name, _, path = found.groups()
        content = self.server.repositories[name][path]
        self.server.read.append(path)
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET  # noqa: N815


SHA = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in server, which huggingface_hub takes for the hub, with an empty cache; we have no token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.created, server.read = {}, [], []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_network_goes_to_the_hub_and_comes_back(hub, run_here, folder, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    status, printed, error = run_here(f"--ckpt={checkpoint}", "--to=own", "--hub=someone/movements", "--private")
    assert status == 0, error
    assert printed == f"published: own\npublished: {hub.address}/someone/movements\n"
    assert hub.created[0]["visibility"] == "private"
    files = hub.repositories["someone/movements"]
    assert files == {path.name: path.read_bytes() for path in Path("own").iterdir()}
    assert b'octvideo.create_model("someone/movements")' in files["README.md"]

    monkeypatch.delenv("HF_TOKEN")
    wanted = load_trained(checkpoint)
    torch.testing.assert_close(logits(octvideo.create_model("someone/movements")), logits(wanted.network))
    assert load_trained(Path("someone/movements")).labels == wanted.labels
    assert "README.md" not in hub.read

    (Path("own") / "README.md").write_text("edited")
    (Path("own") / "notes.txt").write_text("not for others")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_here("--ckpt=own", "--hub=someone/movements")[0] == 0
    assert files["README.md"] == b"edited"
    assert "notes.txt" not in files


def test_a_copy_of_the_hub_serves_where_it_cannot_be_reached(hub, folder, checkpoint, monkeypatch):
    hub.repositories["someone/movements"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["someone/torn"] = {"README.md": b""}
    with pytest.raises(ValueError, match=r"a folder without config\.json and model\.safetensors"):
        load_trained("someone/torn")
    load_trained("someone/movements")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(logits(load_trained("someone/movements").network), logits(load_trained(folder).network))
    with pytest.raises(
        ValueError, match=r"^someone/other: nothing of that name is here, and http://127.0.0.1:9 cannot"
    ):
        load_trained("someone/other")
    with pytest.raises(ValueError, match=r"^someone/other: http://127.0.0.1:9: .*[Rr]efused"):
        push.upload(folder, "someone/other")


def test_what_the_hub_refuses_is_one_line(hub, run_here, folder, monkeypatch):
    status, _, error = run_here(f"--ckpt={folder}", "--hub=someone/movements")
    assert (status, error.count("\n")) == (2, 1)
    assert f"someone/movements: {hub.address} refuses: log in by `hf auth login`, or set HF_TOKEN" in error
    with pytest.raises(
        ValueError, match=r"^someone/other: nothing of that name is here or at http.*if it is private, log"
    ):
        load_trained("someone/other")
    with pytest.raises(ValueError, match=r"^someone/asking: http.* wants you to ask for access to it"):
        load_trained("someone/asking")
    with pytest.raises(ValueError, match=r"^some--one/x: http.*"):
        load_trained("some--one/x")


def test_paths_are_not_looked_up_on_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for name in ("runs/best", "nowhere/best.ckpt", "nowhere/a/b", "best"):
        with pytest.raises(FileNotFoundError):
            load_trained(name)
    assert not hub.read


@pytest.mark.slow
@pytest.mark.long
def test_the_address_of_the_hub_comes_from_the_environment(hub, folder, motions, tmp_path):
    """In a process of its own, as a user runs it."""
    video = next((motions / "val").glob("*.mp4"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "secret",
    }
    for words in (
        ["push.py", "--ckpt", folder, "--hub", "someone/movements"],
        ["predict.py", video, "--ckpt", "someone/movements", "--clips=1", "--crops=1", "--device=cpu"],
    ):
        command = [sys.executable, ROOT / "tools" / words[0], *words[1:]]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
    assert "1 videos predicted, 0 bad" in finished.stdout
    assert sorted(hub.repositories["someone/movements"]) == ["README.md", "config.json", "model.safetensors"]


def test_tensors_that_share_memory_are_written_each(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    from octvideo.models.published import read_published, write_published

    about = {"options": {}, "preprocessing": {"short_side": (1, 2)}, "labels": ["a"], "training": {}, "card": ""}
    write_published(tmp_path / "x", tensors={"a": shared, "b": shared.T, "c": shared}, **about)
    found = read_published(tmp_path / "x")
    assert found.preprocessing == {"short_side": (1, 2)}
    assert torch.equal(found.tensors["network.b"], shared.T)


def test_a_run_folder_is_no_checkpoint_but_holds_some(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"name a file in .*checkpoints, such as last\.ckpt"):
        load_trained(tmp_path / "run")
