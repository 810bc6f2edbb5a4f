"""octvideo export: what it writes, and that docs/export.md is true."""

import importlib.metadata
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, run_tool, settle
from pytorchvideo.models import resnet

from octvideo.commands import export
from octvideo.commands import options as command_options
from octvideo.data.clips import Draw, TestViews
from octvideo.data.decoding import Decoding
from octvideo.data.lists import VideoList
from octvideo.data.motions import write_video
from octvideo.data.sampling import Sampling
from octvideo.models.checkpoint import load_trained
from octvideo.models.zoo import slow_frames
from octvideo.training.recognizer import Recognizer

WITHOUT_TORCH, WITH_TORCH = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
SHAPES = [(1,), (3,), (1, 5, 37, 51), (2, 9, 75, 34)]
LABELS = ["using segway", "yoga", "jump", "sit", "zumba", "tai chi", "naïve"]
PREPROCESSING = {
    "clip_frames": 4,
    "frame_stride": 3,
    "sampling": "slowfast",
    "target_fps": 15,
    "short_videos": None,
    "test_crop_size": 36,
}
OF_TRAINING = {"crop_size": 28, "short_side": (36, 40), "mirror": True}


@pytest.fixture(scope="module", autouse=True)
def _few_blocks():
    """Networks of a third of the layers, and a third of the time to export them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet._MODEL_STAGE_DEPTH, 50, (1, 1, 1, 1))
        yield


@pytest.fixture(scope="module")
def run_here():
    """Runs the command in this process; gives its exit status."""

    def run(*options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_options, "program", "export.py")
            try:
                return export.main(["--rounds=1", *map(str, options)])
            except SystemExit as error:
                return error.code

    return run


@pytest.fixture(scope="module")
def checkpoint(built_once):
    """A file as train_net.py writes it."""
    return built_once("checkpoint_to_export", write_checkpoint) / "best.ckpt"


def write_checkpoint(folder):
    torch.manual_seed(0)
    module = Recognizer("i3d_r50", alpha=0.25, num_classes=len(LABELS), width=8, mean=0.4, std=0.2)
    settle(module)
    data = {"labels": LABELS, "preprocessing": PREPROCESSING | OF_TRAINING}
    content = {"hyper_parameters": dict(module.hparams), "VideoData": data, "state_dict": module.state_dict()}
    torch.save(content, folder / "best.ckpt")


@pytest.fixture(scope="module")
def onnx_file(run_here, checkpoint, built_once):
    def write(folder):
        assert run_here("--ckpt", checkpoint, "--output", folder / "network.onnx") == 0

    return built_once("onnx_file", write) / "network.onnx"


@pytest.fixture(scope="module")
def pt2_file(run_here, checkpoint, built_once):
    def write(folder):
        options = ("--output", folder / "network.pt2", "--alpha", 0.5, "--no-fuse")
        assert run_here("--ckpt", checkpoint, *options) == 0

    return built_once("pt2_file", write) / "network.pt2"


@pytest.fixture(scope="module")
def program(pt2_file):
    """The .pt2 file in PyTorch, and what it says."""
    extra = {"octvideo.json": ""}
    return torch.export.load(pt2_file, extra_files=extra).module(), json.loads(extra["octvideo.json"])


def random_clips(batch, *size):
    return torch.randint(256, (batch, 3, *(size or (4, 36, 36))), dtype=torch.uint8)


def logits_of(trained, clips):
    with torch.no_grad():
        return trained.network(trained.normalize(clips))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_onnx_file_gives_the_logits_of_the_checkpoint_for_any_size(onnx_file, checkpoint, shape):
    clips = random_clips(*shape)
    (logits,) = onnxruntime.InferenceSession(onnx_file).run(["logits"], {"clips": clips.numpy()})
    wanted = logits_of(load_trained(checkpoint), clips)
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_an_onnx_file_is_alone_and_of_an_old_opset_and_names_its_sizes(onnx_file):
    assert [path.name for path in onnx_file.parent.iterdir()] == ["network.onnx"]
    model = onnx.load(onnx_file)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
    (given,), (output,) = model.graph.input, model.graph.output
    sizes = [[cell.dim_param or cell.dim_value for cell in x.type.tensor_type.shape.dim] for x in (given, output)]
    assert sizes == [["batch", 3, "frames", "height", "width"], ["batch", len(LABELS)]]
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)


def test_files_say_how_clips_are_made_and_what_comes_out(onnx_file, program, checkpoint):
    said = {prop.key: json.loads(prop.value) for prop in onnx.load(onnx_file, load_external_data=False).metadata_props}
    version = {"octvideo_version": importlib.metadata.version("octvideo")}
    wanted = PREPROCESSING | {"mean": 0.4, "std": 0.2, "labels": LABELS, "output": "logits"} | version
    assert said == load_trained(checkpoint).options | wanted
    assert program[1] == said | {"alpha": 0.5}
    assert said["name"] == "i3d_r50"
    assert said["alpha"] == 0.25


def test_no_folder_of_this_machine_is_in_a_file(onnx_file, pt2_file):
    for path in (onnx_file, pt2_file):
        assert str(ROOT).encode() not in path.read_bytes()


def test_a_program_gives_the_logits_of_the_checkpoint_at_another_alpha(program, checkpoint):
    network, _ = program
    for shape in SHAPES:
        clips = random_clips(*shape)
        torch.testing.assert_close(network(clips), logits_of(load_trained(checkpoint, alpha=0.5), clips))
    assert any("running_mean" in name for name in network.state_dict())


@pytest.mark.long
def test_an_untrained_network_of_a_fixed_batch_gives_probabilities(run_here, tmp_path, capsys):
    path = tmp_path / "new folder" / "network.pt2"
    options = ("--name=i3d_r50", "--alpha=.25", "--clip=4x36x40", "--num_classes=5", "--batch=3", "--softmax")
    assert run_here(*options, "--output", path) == 0
    extra = {"octvideo.json": ""}
    network = torch.export.load(path, extra_files=extra).module()
    clips = torch.randint(256, (3, 3, 4, 36, 40), dtype=torch.uint8)
    probabilities = network(clips)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    assert probabilities.std(1).min() > 0.01  # the network is not silent
    with pytest.raises(AssertionError, match="Guard failed"):
        network(clips[:2])
    about = json.loads(extra["octvideo.json"])
    assert (about["name"], about["output"], about["labels"][4]) == ("i3d_r50", "probabilities", "class 4")
    printed = capsys.readouterr().out
    assert "clips (3, 3, 4, 36, 40)" in printed
    assert "free sizes: frames from 4, height from 33, width from 33\n" in printed
    assert re.search(r"│ PyTorch +│ [\d.]+ +│ 1.00 +│\n│ torch.export +│ [\d.]+ +│ [\d.]+ +│", printed)
    assert re.search(r"network.pt2: \d+\.\d MB; probabilities differ by \S+ of the largest\n", printed)


class Mean(torch.nn.Module):
    def forward(self, clips):
        return clips.float().mean((1, 2, 3, 4))


class Slow(torch.nn.Module):
    def forward(self, clips):
        return slow_frames(clips.float(), 4)


def test_frames_of_slowfast_are_free_in_multiples():
    program = export.trace(Slow(), random_clips(2, 8, 4, 4), export.AXES, step=4)
    run = program.module()
    clips = random_clips(1, 12, 3, 5)
    assert torch.equal(run(clips), Slow()(clips))
    assert export.takes(run, random_clips(1, 16, 4, 4))
    assert not export.takes(run, random_clips(1, 10, 4, 4))


def test_a_size_that_a_network_fixes_is_named(run_here, tmp_path, capsys):
    path = tmp_path / "network.pt2"
    assert run_here("--name=i3d_r50", "--clip=4x32x32", "--free=frames,height", "--output", path) == 2
    assert capsys.readouterr().err == "export.py: error: i3d_r50 fixes height\n"
    assert not path.exists()


def test_a_plain_export_has_no_folded_operations(run_here, checkpoint, tmp_path):
    path = tmp_path / "network.pt2"
    assert run_here("--ckpt", checkpoint, "--output", path, "--plain", "--free=none") == 0
    called = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert {"aten.conv3d.default", "aten.avg_pool3d.default", "aten.upsample_nearest3d.vec"} <= called
    assert not {"aten.conv2d.default", "aten.avg_pool2d.default", "aten.unflatten.int"} & called


def wrong_for_white_clips(logits, clips):
    return logits * (1.001 if clips.min() == 255 else 1)


def wrong_for_two_clips(logits, clips):
    return logits[:1].expand(len(logits), -1)


def not_numbers(logits, clips):
    return logits / 0 * 0


@pytest.mark.parametrize("change", [wrong_for_white_clips, wrong_for_two_clips, not_numbers])
def test_a_file_that_gives_something_else_is_not_written(run_here, checkpoint, tmp_path, monkeypatch, capsys, change):
    trained = load_trained(checkpoint)

    def write(program, path, about):
        path.write_text("this one")
        return lambda clips: change(logits_of(trained, clips), clips)

    wrong = ("another runtime", (), write)
    monkeypatch.setitem(export.FORMATS, ".pt2", wrong)
    real = torch.export.export  # takes seconds for a network
    monkeypatch.setattr(torch.export, "export", lambda module, *args, **options: real(Mean(), *args, **options))
    path = tmp_path / "network.pt2"
    path.write_text("the former one")
    assert run_here("--ckpt", checkpoint, "--output", path) == 1
    assert re.fullmatch(
        r"export.py: error: another runtime gives logits that differ from PyTorch's by \S+ of the largest, more than "
        r"--tolerance 0.0001: no file is written\n",
        capsys.readouterr().err,
    )
    assert path.read_text() == "the former one"
    assert list(tmp_path.iterdir()) == [path]
    tolerated = run_here("--ckpt", checkpoint, "--output", path, "--tolerance=1000") == 0
    assert tolerated == (change is not not_numbers)


I3D = ("--name=i3d_r50", "--clip=4x32x32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of the arguments --ckpt --name is required"),
        ((*I3D, "--ckpt=a.ckpt"), "argument --ckpt: not allowed with argument --name"),
        (("--ckpt=missing.ckpt",), "No such file or directory: 'missing.ckpt'"),
        (("--ckpt=a.ckpt", "--clip=4x32x32"), "--clip and --num_classes are for --name: a checkpoint has its own"),
        (("--ckpt=a.ckpt", "--num_classes=5"), "--clip and --num_classes are for --name: a checkpoint has its own"),
        (("--name=i3d_r50",), "--name needs --clip TxHxW, such as 8x224x224"),
        (("--name=resnet", "--clip=4x32x32"), "no model 'resnet'; there are c2d_r50, "),
        ((*I3D, "--alpha=2"), "alpha must lie in [0, 1], got 2.0"),
        ((*I3D, "--clip=4x32"), "argument --clip: must be TxHxW, such as 8x224x224, got '4x32'"),
        ((*I3D, "--clip=0x32x32"), "argument --clip: must be TxHxW, such as 8x224x224, got '0x32x32'"),
        ((*I3D, "--free=depth"), "argument --free: must be of batch, frames, height, width, or none, got 'depth'"),
        ((*I3D, "--batch=0"), "argument --batch: must be a whole number from 1, got '0'"),
        ((*I3D, "--clip=1x32x32"), "i3d_r50 does not take clips of 1x32x32: "),
        ((*I3D, "--output=network.tflite"), "--output must be a file that ends in .onnx or .pt2, got network.tflite"),
        ((*I3D, "--output=folder.onnx"), "--output must be a file that ends in .onnx or .pt2, got folder.onnx"),
    ],
)
def test_a_mistake_is_one_line(run_here, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    assert run_here("--output=network.pt2", *options) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("export.py: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(run_here, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    assert run_here(*I3D, "--output=network.onnx") == 2
    assert capsys.readouterr().err == (
        "export.py: error: .onnx files need onnx, onnxruntime, onnxscript: pip install 'octvideo[export]'\n"
    )


@pytest.mark.parametrize("num_frames", [70, 7])
@pytest.mark.parametrize(("protocol", "fps"), [("slowfast", 15), ("mmaction", None)])
def test_the_documented_code_predicts_a_video_without_torch_as_octvideo_does(
    onnx_file, checkpoint, tmp_path, protocol, fps, num_frames
):
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, 6, 8, 3), np.uint8)
    write_video(tmp_path / "video.mp4", noise.repeat(8, 1).repeat(8, 2), 30)  # 48 x 64
    model = onnx.load(onnx_file)
    for said in model.metadata_props:
        said.value = {"sampling": json.dumps(protocol), "target_fps": json.dumps(fps)}.get(said.key, said.value)
    onnx.save(model, tmp_path / "network.onnx")
    command = [sys.executable, "-X", "utf8", "-c", "import sys; sys.modules['torch'] = None\n" + WITHOUT_TORCH]
    finished = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8")

    trained = load_trained(checkpoint)
    decoding = Decoding(VideoList([str(tmp_path / "video.mp4")], np.zeros(1, np.int64)), Sampling(4, 3, protocol, fps))
    views = TestViews(decoding, crop_size=36, short_side=36, num_clips=1, num_crops=1)
    scores, order = logits_of(trained, views[Draw(0, 0, 0)].clips).softmax(1)[0].sort(descending=True)
    rows = [line.split(" ", 1) for line in finished.stdout.splitlines()]
    assert [label for _, label in rows] == [LABELS[number] for number in order[:5]]
    np.testing.assert_allclose([float(score) for score, _ in rows], scores[:5], atol=6e-4)


def test_the_documented_code_runs_a_program(pt2_file, monkeypatch, capsys):
    monkeypatch.chdir(pt2_file.parent)
    exec(compile(WITH_TORCH, "docs/export.md", "exec"), {})
    first, second = re.fullmatch(r"\['(.*)', '(.*)'\]\n", capsys.readouterr().out).groups()
    assert {first, second} <= set(LABELS)


def test_the_tool_is_a_program_of_its_own(tmp_path):
    finished = run_tool("export.py", "--ckpt", tmp_path / "none.ckpt", "--output", tmp_path / "network.pt2")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)


def test_a_link_stays_and_a_full_device_is_one_line(run_here, checkpoint, tmp_path, capsys):
    (tmp_path / "link.pt2").symlink_to("target")
    (tmp_path / "target").write_text("old")
    (tmp_path / "target").chmod(0o604)
    assert run_here("--ckpt", checkpoint, "--free=none", "--output", tmp_path / "link.pt2") == 0
    assert os.readlink(tmp_path / "link.pt2") == "target"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o604
    with (tmp_path / "target").open("rb") as file:
        assert torch.export.load(file).module()(torch.zeros(1, 3, 4, 36, 36, dtype=torch.uint8)).shape == (
            1,
            len(LABELS),
        )
    try:
        os.mknod(tmp_path / "full.pt2", stat.S_IFCHR | 0o666, os.makedev(1, 7))
        (tmp_path / "full.pt2").open("wb").close()
    except OSError:
        pytest.skip("no device can be made here")
    capsys.readouterr()
    assert run_here("--ckpt", checkpoint, "--free=none", "--output", tmp_path / "full.pt2") == 2
    message = f"export.py: error: [Errno 28] No space left on device: '{tmp_path / 'full.pt2'}'\n"
    assert capsys.readouterr().err.endswith(message)
    assert (tmp_path / "full.pt2").is_char_device()
