"""Every block of the pages in docs/ runs, from top to bottom, and every link of the built pages leads somewhere.

Blocks of a page run in a folder that looks like the repository, with the page's own options, and more behind them that
make the work small (SMALL). What stands in for what a reader has:

- videos, downloads, lists and annotations: videos of the motions data set under the names that pages use
- runs: one of an epoch, of a network of four blocks; published weights: networks of random weights
- GPUs: the CPU; torchrun: two processes that `run_processes` starts (of several nodes: options are parsed, no more,
  as those of a benchmark of compiled networks, which takes minutes, and of networks with published weights)
- a sweep: its last alpha with one seed, each training of one step, in forks of it; a study: likewise, one trial
- sbatch: the script in bash, with an srun that notes its command, which then runs as Slurm's only task
- the Hugging Face hub: nothing; commands for it are not run
- live video: a file in its place; for cameras and addresses, options are parsed, no more
- make: `make -n`; pip: a look at what is installed, and at the extras of pyproject.toml

A `text` block right behind a `python` block is what that block prints; others are no code. A `yaml` block is mine.yaml.
"""

import contextlib
import glob
import importlib.metadata
import importlib.util
import io
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import conftest
import gpu_suite
import pytest
import torch
import torchvision
import yaml
from conftest import FORKS, ROOT, long, run_processes, run_tool, small
from pytorchvideo.models import resnet
from torch.distributed.run import get_args_parser

import octvideo
from experiments import budget, domains, elastic, real_weights, serving, shrinking, speed, streams
from octvideo import MODELS, create_model
from octvideo.commands import children, serve, stream
from octvideo.models.choose_alpha import choose_alpha
from octvideo.training.recognizer import Recognizer

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
BLOCK = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
# Pages whose blocks take half a minute and more.
LONG = {
    *("benchmarks.md", "big_data.md", "choosing_alpha.md", "elastic.md", "export.md", "kinetics.md", "many_gpus.md"),
    *("results.md", "shrink.md", "train_your_network.md"),
}
LANGUAGES = {"python", "bash", "yaml", "text"}

CLIPS = ["--data.crop_size=32", "--data.short_side=[32, 36]", "--data.test_crop_size=32", "--data.num_workers=0"]
SMALL = {
    "train_net.py": [
        *(*CLIPS, "--data.clip_frames=8", "--data.batch_size=2", "--model.width=8"),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=1"),
        *("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"),
    ],
    "test_net.py": [
        *(*CLIPS, "--data.test_clips=1", "--data.test_crops=1", "--statistics_batches=1"),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_test_batches=1"),
    ],
    "allocation.py": [*CLIPS, "--alphas=.5", "--batches=1", "--budget=.97", r"--skip=['blocks\.[345]']"],
    "operations.py": ["--alphas=.25", "--batch=1", "--dtype=fp32", "--rounds=1"],
    "prepare_data.py": ["--workers=1"],
    "predict.py": ["--clips=1", "--crops=1"],
    "features.py": ["--batch=4"],
    "push.py": [],
    "runs.py": [],
    "shrink.py": [
        *(*CLIPS, "--alphas=.5", "--batches=1", "--budget=.95", "--max-drop=100", "--data.batch_size=2"),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_train_batches=1"),
        "--trainer.limit_test_batches=1",
    ],
    "several_octaves.py": ["--size=2x32x32", "--width=8", "--alphas=.25,.125+.125", "--rounds=1"],
    "report.py": ["--rounds=1"],
    "cost.py": ["--size=4x32x32", "--batch=1", "--rounds=1"],
    "export.py": ["--rounds=1"],
    "spectrum.py": ["--clips=1", "--size=32"],
    "speed.py": [
        *("--size=4x32x32", "--width=8", "--batch=1", "--alphas=.25", "--forms=octvideo"),
        *("--rounds=1", "--warmup=1", "--threads=1", "--device=cpu"),
    ],
    "decoding.py": [
        *("--crop-size=32", "--short-side", "32", "40", "--clip-frames=4", "--passes=1", "--rounds=1"),
        *("--max-videos=1", "--backends=pyav", "--protocols=slowfast"),
    ],
}
PARSED = {
    f"{module.__name__.split('.')[-1]}.py": module
    for module in (budget, domains, elastic, real_weights, serving, shrinking, streams)
}
SHALLOW = (1, 1, 1, 1)  # blocks of the stages of what tools run, in place of 3, 4, 6, 3
SLURM_TASK = {
    **{"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "17"},
    **{"SLURM_JOB_NAME": "octvideo", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


def start_tool_in(workspace):
    """conftest.start_tool, in another folder than the repository."""

    def start_tool(name, options, folder, **environment):
        folder_of_name = "tools" if (ROOT / "tools" / name).exists() else "experiments"
        arguments = [str(workspace / folder_of_name / name), *map(str, options)]
        process = FORKS.Process(target=_be_tool_in, args=(workspace, arguments, Path(folder), environment))
        process.start()
        return process

    return start_tool


def _be_tool_in(workspace, arguments, folder, environment):
    conftest.ROOT = workspace
    resnet._MODEL_STAGE_DEPTH[50] = SHALLOW
    children.call = _call
    choose_alpha.__kwdefaults__["alphas"] = (0.5,)  # each is predicted in every stage
    conftest._be_tool(arguments, folder, environment)


def _call(tool, options, log, hopeless=None):
    """children.call in a fork: without the seconds that a new process imports, and with the shallow networks."""
    with tempfile.TemporaryDirectory() as folder:
        script = f"{tool}_net.py" if tool in ("train", "test") else f"{tool}.py"
        arguments = [str(conftest.ROOT / "tools" / script), *options]
        process = multiprocessing.Process(target=conftest._be_tool, args=(arguments, Path(folder), {}))
        process.start()
        process.join()
        if process.exitcode:
            raise children.RunFailedError((Path(folder) / "stderr").read_text())
        shutil.copy(Path(folder) / "stdout", log)
    return True


class Reader:
    """Does what a page says, in a folder of its own."""

    def __init__(self, workspace):
        self.workspace = workspace
        self.names = {}
        self.printed = ""

    def read(self, language, code):
        """Runs a block."""
        assert language in LANGUAGES, f"blocks are of {LANGUAGES}, got {language!r}"
        if language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    self.command([file for word in words for file in self.expanded(word)])
        elif language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
                if "runs/" in code:  # what the tools made
                    patch.setitem(resnet._MODEL_STAGE_DEPTH, 50, SHALLOW)
                exec(compile(code, "block", "exec"), self.names)
            self.printed = printed.getvalue()
        elif language == "yaml":
            (self.workspace / "mine.yaml").write_text(code)
            options = ["--cfg=configs/oct_i3d.yaml", "--cfg=mine.yaml", "--print_config"]
            resolved = yaml.safe_load(self.tool("train_net.py", options, small=False).stdout)
            for group, values in yaml.safe_load(code).items():
                resolved_group = resolved[group].get("init_args", resolved[group])
                for key, value in values.items():
                    found = resolved_group[key]
                    assert (value.items() <= found.items()) if isinstance(value, dict) else found == value

    def expanded(self, word):
        return sorted(glob.glob(word, root_dir=self.workspace)) or [word] if "*" in word else [word]

    def command(self, words):
        match words:
            case ["python", script, *options]:
                self.tool(script, options)
            case ["PYTHONPATH=experiments", "python", script, *options]:
                self.tool(script, options, PYTHONPATH="experiments")
            case ["export", assignment]:
                assert re.fullmatch(r"[A-Z_]+=\w+", assignment)
            case ["torchrun", *options]:
                self.torchrun(options)
            case ["sbatch", script, *options]:
                self.sbatch(script, options)
            case ["make", target]:
                subprocess.run(["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            case ["pip", "install", *requirements]:
                self.pip(requirements)
            case ["cat" | "head", *_]:
                assert subprocess.run(words, cwd=self.workspace, check=True, capture_output=True).stdout
            case _:
                pytest.fail(f"no one knows how to run {words} here")

    def tool(self, script, options, *, small=True, **environment):
        name = Path(script).name
        assert (ROOT / (script if "/" in script else f"tools/{script}")).is_file()
        if name == "speed.py" and {"--compile", "--suite"} & set(options):
            (gpu_suite if "--suite" in options else speed).parse(options)
            return None
        if name in PARSED:
            PARSED[name].parse(options)
            return None
        if name == "predict.py" and "--stream" in options and not Path(options[0]).exists():
            stream.parse(options)
            return None
        if name == "push.py" and "--hub" in options:  # tests/test_push.py has a stand-in for it
            return None
        if name == "demo.py":
            self.demo(options)
            return None
        if name == "serve.py":  # tests/test_serve.py starts it
            serve.read_arguments([*options])
            return None
        finished = run_tool(name, *options, *(self.made_small(name, options) if small else []), **environment)
        assert finished.returncode == 0, f"{options}:\n{finished.stdout}\n{finished.stderr}"
        return finished

    def demo(self, options):
        port = conftest.free_port()
        process = conftest.start_tool("demo.py", [*options, f"--port={port}"], self.workspace)
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}") as page:
                assert page.status == 200
                break
            process.join(0.1)
            assert process.exitcode is None, (self.workspace / "stderr").read_text()
        process.terminate()
        process.join(60)
        assert process.exitcode == 0, (self.workspace / "stderr").read_text()

    def made_small(self, name, options):
        """Options that make a command small, for which what others left in its folder is removed."""
        given = dict(itertools.pairwise(options))
        if name == "sweep.py":
            last = given.get("--alphas", "0:pool").split(",")[-1]
            return [*SMALL["train_net.py"], f"--alphas={last}", "--seeds=0", "--rounds=1"]
        if name == "tune.py":
            searched = {f"--{word.split('=')[0]}" for word in options}
            return ["--trials=1", *(word for word in SMALL["train_net.py"] if word.split("=")[0] not in searched)]
        small = [] if "--stream" in options else SMALL[name]
        if name == "export.py" and "--free" not in given:  # tests/test_export.py has all that are free
            small = [*small, "--free=batch"]
        if name == "prepare_data.py" and not {"--part", "--merge"} & {*options}:
            shutil.rmtree(self.workspace / given["--output"], ignore_errors=True)
        if name == "train_net.py" and given.get("--ckpt_path") in (None, "auto"):
            recipe = yaml.safe_load((self.workspace / options[options.index("--cfg") + 1]).read_text())
            folder = given.get("--trainer.default_root_dir", recipe["trainer"]["default_root_dir"])
            shutil.rmtree(self.workspace / folder, ignore_errors=True)
            mine = self.workspace / "mine.yaml"
            if "mine.yaml" in options and "class_path" in mine.read_text():  # a network that is not the zoo's
                small = [word for word in small if word != "--model.width=8"]
            small = [*small, f"--precise_bn={min(1, recipe.get('precise_bn', 0))}"]
        if "--trainer.callbacks.end_epoch" in given:  # of an alpha schedule, which ends before the training does
            small = [*small, "--trainer.callbacks.end_epoch=4", "--trainer.max_epochs=5"]
        return small

    def torchrun(self, options):
        launch = get_args_parser().parse_args(options)
        name, options = launch.training_script.removeprefix("tools/"), launch.training_script_args
        if launch.nnodes != "1:1":
            self.tool(name, [*options, "--print_config"], small=False)
            return
        for finished in run_processes(2, name, *options, *self.made_small(name, options)):
            assert finished.returncode == 0, f"{options}:\n{finished.stdout}\n{finished.stderr}"

    def sbatch(self, script, options):
        srun = self.workspace / "bin" / "srun"
        srun.parent.mkdir(exist_ok=True)
        srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > srun.txt\n')
        srun.chmod(0o755)
        path = {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
        subprocess.run(["bash", script, *options], cwd=self.workspace, check=True, env=os.environ | path)
        noted = (self.workspace / "srun.txt").read_text().splitlines()
        place = noted.index(".venv/bin/python")
        assert all(option.startswith("--") for option in noted[:place])
        assert noted[place + 1] == "tools/train_net.py"
        self.tool("train_net.py", noted[place + 2 :], **SLURM_TASK)

    def pip(self, requirements):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for requirement in requirements:
            name, _, extra = requirement.rstrip("]").partition("[")
            importlib.metadata.distribution(name)
            assert not extra or extra in extras


@pytest.fixture(scope="module")
def run_folder(built_once, motions):
    """The folder of a run of one epoch."""

    def train(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conftest, "start_tool", start_tool_in(ROOT))
            finished = run_tool(
                "train_net.py", *small(motions, folder), "--trainer.max_epochs=1", "--data.batch_size=2"
            )
        assert finished.returncode == 0, finished.stderr

    return built_once("run_of_the_docs", train)


@pytest.fixture(scope="module")
def published(built_once):
    """A folder with what stands in for published weights."""

    def write(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(resnet._MODEL_STAGE_DEPTH, 50, SHALLOW)
            torch.save({"model_state": create_model("i3d_r50", width=8).state_dict()}, folder / "I3D_8x8_R50.pyth")
        image = torchvision.models.resnet50().state_dict()
        narrow = {  # an eighth of the channels
            name: tensor[tuple(slice(size // 8 if size >= 64 else size) for size in tensor.shape)].clone()
            for name, tensor in image.items()
        }
        torch.save(narrow, folder / "resnet50.pth")

    return built_once("published_weights", write)


@pytest.fixture
def workspace(tmp_path, motions, run_folder, published, monkeypatch):
    """What looks like the repository, with stand-ins for a reader's files."""
    for folder in ("configs", "tools", "experiments", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "motions").symlink_to(motions)
    videos = {split: sorted((motions / split).glob("*.mp4")) for split in ("train", "val")}

    def put(video, *places):
        for place in places:
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(video, tmp_path / place)

    put(videos["val"][0], "clip.mp4", "video.mp4", "recordings/a.mp4", "clips/a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    annotations = "label,youtube_id,time_start,time_end,split\n"
    for split, count in (("train", 6), ("val", 2)):
        lines = []
        for number, video in enumerate(videos[split][:count]):
            put(video, f"videos/{split}/{('fight', 'nofight')[number % 2]}/{split}{number}.mp4")
            put(video, f"downloads/{split}{number}_000002_000012.mp4", f"data/kinetics400/videos/{split}{number}.mp4")
            lines.append(f"{split}{number}.mp4 {number}\n")
        (tmp_path / "data" / "kinetics400" / f"{split}.csv").write_text("".join(lines))
        rows = [f"class {number:03},{split}{number},2,12,{split}\n" for number in range(400)]  # most are gone
        (tmp_path / f"kinetics-400_{split}.csv").write_text(annotations + "".join(rows))
    for run in ("quickstart", "oct_i3d", "i3d", "i3d_pooled"):
        folder = shutil.copytree(run_folder, tmp_path / "runs" / run, copy_function=os.link, symlinks=True)
        options = (folder / "config.yaml").read_text()
        (folder / "config.yaml").unlink()
        (folder / "config.yaml").write_text(options.replace(str(run_folder), f"runs/{run}"))

    for weights in published.iterdir():
        shutil.copy(weights, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conftest, "start_tool", start_tool_in(tmp_path))
    return tmp_path


def write_checkpoint(path):
    """A checkpoint as train_net.py writes it, of the protocol that the page on export has a script for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet._MODEL_STAGE_DEPTH, 50, SHALLOW)
        module = Recognizer("i3d_r50", num_classes=8, width=8)
    preprocessing = {"clip_frames": 4, "frame_stride": 3, "sampling": "slowfast", "target_fps": 15}
    data = {"labels": list("abcdefgh"), "preprocessing": {**preprocessing, "short_videos": None, "test_crop_size": 36}}
    path.unlink()  # it is the other runs' too
    torch.save({"hyper_parameters": dict(module.hparams), "VideoData": data, "state_dict": module.state_dict()}, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [long(page) if page in LONG else page for page, text in PAGES.items() if BLOCK.search(text)]
)
def test_every_block_of_a_page_runs(page, workspace, monkeypatch):
    if page == "export.md":
        write_checkpoint(workspace / "runs" / "oct_i3d" / "checkpoints" / "best.ckpt")
    reader, before = Reader(workspace), None
    for block in BLOCK.finditer(PAGES[page]):
        language, code = block["language"], block["code"]
        if "import nncf" in code and importlib.util.find_spec("nncf") is None:
            continue  # a large package
        if language == "text" and before and before["language"] == "python":
            gap = PAGES[page][before.end() : block.start()]
            assert gap.strip() or reader.printed == code
        reader.read(language, code)
        before = block


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_code_but_fenced_blocks(page):
    text = BLOCK.sub("", PAGES[page])
    assert "```" not in text
    assert not re.search(r"\n\n {4}", text)


class Links(HTMLParser):
    """What a page has and what it wants.

    Attributes:
        ids: places in it that links may lead to.
        links: what its links lead to.
        resources: what a browser loads to show it.
    """

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.resources = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href") is not None:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.resources.append(given["href"])
        elif given.get("src"):
            self.resources.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as make docs builds them."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    assert not re.search("warn", built.stdout + built.stderr, re.IGNORECASE)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Links(path.read_text()) for path in site.rglob("*.html")}


def test_every_link_of_the_site_leads_somewhere(site, pages):
    assert len(pages) >= len(PAGES)
    for path, page in pages.items():
        for link in page.links + page.resources:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https", link
                assert re.fullmatch(r"[\w.-]+\.\w+", parts.netloc), link
                continue
            # 404.html is shown at any address: its links start from the root.
            start = site if parts.path.startswith("/") else path.parent
            target = path if not parts.path else (start / unquote(parts.path).lstrip("/")).resolve()
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"


def test_pages_load_nothing_from_elsewhere(site, pages):
    for page in pages.values():
        assert not [resource for resource in page.resources if urlsplit(resource).netloc]
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import\s*|url\()[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_the_api_reference_has_every_module_and_every_public_name(pages):
    ids = {name for page in pages.values() for name in page.ids}
    for name in octvideo.__all__:
        kind = getattr(octvideo, name)
        home = "octvideo.models.zoo" if kind is MODELS else kind.__module__
        assert {f"octvideo.{name}", f"{home}.{name}"} & ids, name
    internal = {
        "files",
        "layers.finishing",
        "layers.kernels",
        "layers.pending",
        "layers.octaves",
        "layers.paths",
        "layers.parts",
        "layers.swapping",
        "layers.convolution",
    }
    internal |= {
        "layers.merging",
        "models.octave_report",
        "models.outputs",
        "models.trace",
        "layers.resampling",
        "layers.calls",
        "layers.several",
        "layers.shares",
        "layers.functions",
        "layers.reshaping",
        "layers.tracing",
        "models.type_checks",
        "models.octavize",
        "models.channels",
        "models.choose_low",
        "models.fuse",
        "models.scoring",
        "evaluation.charts",
    }
    readers = ("stream", "pictures_reader", "pyav_reader", "torchcodec_reader", "decord_reader")
    internal |= {"data.preparation.journal", "data.shared_memory", *(f"data.{name}" for name in readers)}
    for file in (ROOT / "octvideo").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT / "octvideo").with_suffix("").parts)
        if file.stem not in ("__init__", "__main__") and module not in internal and not module.startswith("commands."):
            assert f"octvideo.{module}" in ids, f"{module}: put it on a page in docs/api, or among the internal ones"
