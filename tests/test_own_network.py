"""Networks that octvideo did not write: built, fitted, octavized, recorded, and used from their checkpoint alone."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import long, run_tool, small
from own_examples import Outputs, Tiny, TwoHeads
from torch import nn
from torchvision.models import googlenet
from torchvision.models.video import r3d_18

from octvideo import Octaves, build_network
from octvideo.commands import export
from octvideo.errors import UserError
from octvideo.models.checkpoint import load_trained, restore
from octvideo.models.own_network import FrameAverage, adapt, check_record, entry_of, fit_classes, logits_of, record_of
from octvideo.models.zoo import create_model, set_alpha
from octvideo.training.recognizer import Recognizer

pytestmark = pytest.mark.usefixtures("one_thread")
CLIP = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
OPTIONS = {"num_classes": 8, "alpha": 0.25, "skip": None, "downsample": "conv", "round_to": 1}


def test_a_network_remembers_how_it_was_built():
    network = build_network("own_examples.Tiny", width=4)
    assert isinstance(network, Tiny)
    assert network.conv1.out_channels == 4
    assert record_of(network) == {"class_path": "own_examples.Tiny", "init_args": {"width": 4}}
    assert record_of(Tiny()) == {"class_path": "own_examples.Tiny", "init_args": None}


def test_functions_that_say_they_return_networks_build_too():
    assert type(build_network("timm.create_model", model_name="resnet10t")).__name__ == "ResNet"
    image = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet10t", "num_classes": 3}}
    network = build_network("octvideo.models.own_network.FrameAverage", network=image)
    assert network(torch.zeros(2, 3, 4, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("own_examples.Tinny", {}, "cannot be imported.*PYTHONPATH"),
        ("no_such_package.Net", {}, "cannot be imported: No module named 'no_such_package'"),
        ("Tiny", {}, "cannot be imported"),
        ("os.system", {"command": "exit 1"}, "must be a subclass of nn.Module, or a function annotated"),
        ("subprocess.check_output", {"args": "true"}, "must be a subclass of nn.Module"),
        ("own_examples.Outputs", {}, "must be a subclass of nn.Module"),
        ("own_examples.Tiny", {"widht": 3}, "network own_examples.Tiny: got an unexpected keyword argument 'widht'"),
        ("own_examples.Tiny", {"width": "x"}, "network own_examples.Tiny: "),
    ],
)
def test_what_is_no_network_is_not_called(path, arguments, message):
    with pytest.raises(UserError, match=message):
        build_network(path, **arguments)


def test_the_classifier_is_replaced_unless_it_fits():
    network = Tiny(num_classes=5)
    before = network.classifier
    assert fit_classes(network, 5) == ""
    assert network.classifier is before
    assert fit_classes(network, 8) == "the network's last linear layer, classifier, is a new one: 5 classes became 8"
    assert network(CLIP).shape == (2, 8)
    image = timm.create_model("mobilenetv3_small_050", num_classes=10)
    fit_classes(image, 3)
    assert image.num_classes == 3
    with pytest.raises(UserError, match="Conv3d has no linear layer"):
        fit_classes(nn.Conv3d(1, 1, 1), 3)


def test_logits_are_found_among_outputs():
    logits, other = torch.zeros(2, 8), torch.zeros(2, 5)
    outputs = Outputs(logits, other)
    for found in (logits, outputs, {"logits": logits}, SimpleNamespace(logits=logits)):
        assert logits_of(found, "logits", 8) is logits
    assert logits_of((other, logits), 1, 8) is logits
    for output, key, message in (
        (outputs, None, "got Outputs; name the logits among its outputs by model.output"),
        (other, None, r"must give logits \(B, 8\), got \(2, 5\)"),
        (outputs, "logit", "have no 'logit': .*logits.*early"),
        ((logits,), 1, "have no 1"),
        ({"a": logits}, "b", "have no 'b': .*a"),
        ({"logits": 3}, "logits", "got int"),
    ):
        with pytest.raises(UserError, match=message):
            logits_of(output, key, 8)
    assert entry_of(outputs, "early") is other


def test_images_are_averaged_over_time():
    image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    by_hand = torch.stack([image(CLIP[:, :, frame]) for frame in range(4)]).mean(0)
    torch.testing.assert_close(FrameAverage(image)(CLIP), by_hand)


def test_alpha_0_is_the_network_itself_and_other_alphas_come_and_go():
    network = Tiny().eval()
    vanilla, kinds = network(CLIP), [type(module) for module in network.modules()]
    adapt(network, 0)
    assert [type(module) for module in network.modules()] == kinds
    set_alpha(network, 0.25)
    seen = []
    network.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert not torch.equal(network(CLIP), vanilla)
    assert isinstance(seen[0], Octaves)
    set_alpha(network, {"conv3": 0.5})
    network(CLIP)
    assert isinstance(seen[1], torch.Tensor)
    set_alpha(network, 0)
    assert torch.equal(network(CLIP), vanilla)
    with pytest.raises(UserError, match="for the zoo's networks, not for Tiny"):
        set_alpha(network, [0.1, 0.1, 0.1, 0])
    with pytest.raises(UserError, match="set_alpha takes a network that create_model built"):
        set_alpha(Tiny(), 0.5)


def test_skipped_layers_stay_vanilla():
    network = adapt(Tiny(), 0.25, skip=["conv3"])
    assert "alpha=0.25" in repr(network.conv2)
    assert "alpha=0.25" not in repr(network.conv3)


def checkpoint_of(recognizer, path, size=64):
    """A file as training writes it."""
    data = {"preprocessing": {"clip_frames": 2, "test_crop_size": size}}
    content = {"state_dict": recognizer.state_dict(), "hyper_parameters": dict(recognizer.hparams), "VideoData": data}
    torch.save(content, path)
    return path


def test_checkpoints_from_python_build_the_network_again(tmp_path):
    own = build_network("own_examples.TwoHeads", width=4)
    recognizer = Recognizer(network=own, num_classes=8, alpha=0.25, output="logits", auxiliary={"early": 0.5}).eval()
    trained = load_trained(checkpoint_of(recognizer, tmp_path / "a.ckpt"))
    assert trained.name == "own_examples.TwoHeads"
    clips = torch.randint(256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(trained.network(trained.normalize(clips)), recognizer(clips))
    assert load_trained(tmp_path / "a.ckpt", 0.5).options["alpha"] == 0.5
    assert isinstance(restore(trained.options | {"network": None, "name": "i3d_r50", "width": 8}), nn.Module)


def test_a_checkpoint_that_cannot_build_its_network_says_what_to_do(tmp_path, monkeypatch):
    path = checkpoint_of(Recognizer(network=Tiny(num_classes=8), num_classes=8), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"arguments of network own_examples.Tiny are not recorded.*build_network"):
        load_trained(path)
    recognizer = Recognizer(network=build_network("own_examples.Tiny"), num_classes=8)
    recognizer.hparams["network"]["class_path"] = "elsewhere.Tiny"
    with pytest.raises(UserError, match=r"network elsewhere.Tiny cannot be imported: No module named 'elsewhere'"):
        load_trained(checkpoint_of(recognizer, tmp_path / "b.ckpt"))
    recognizer.hparams["network"] = {"class_path": "own_examples.Tiny", "init_args": {"width": 3}}
    with pytest.raises(UserError, match=r"its weights do not fit the own_examples.Tiny that it describes"):
        load_trained(checkpoint_of(recognizer, tmp_path / "c.ckpt"))


def test_options_of_the_zoo_are_refused():
    with pytest.raises(UserError, match=r"model.width 8, model.dropout 0.2; --model.width null --model.dropout"):
        Recognizer(network=Tiny(), num_classes=8, width=8, dropout=0.2)
    with pytest.raises(UserError, match=r"model.widht"):
        Recognizer(network=Tiny(), num_classes=8, widht=8)


def test_weights_start_a_network(tmp_path):
    before = Tiny(num_classes=5)
    torch.save(before.state_dict(), tmp_path / "w.pt")
    network = Recognizer(network=Tiny(), num_classes=8, weights=str(tmp_path / "w.pt")).network
    assert torch.equal(network.conv1.weight, before.conv1.weight)
    assert network.classifier.out_features == 8


@pytest.mark.parametrize("alpha", [0, 0.25])
def test_published_networks_take_the_seam(alpha):
    images = [FrameAverage(timm.create_model(name)) for name in ("resnet10t", "mobilenetv3_small_050")]
    for network, size in ((r3d_18(num_classes=4), 16), *((image, 32) for image in images)):
        recognizer = Recognizer(network=network, num_classes=8, alpha=alpha)
        clips = torch.zeros(1, 3, 4, size, size, dtype=torch.uint8)
        assert recognizer.eval()(clips).shape == (1, 8)


def test_auxiliary_logits_count_in_training_only():
    torch.manual_seed(0)
    network = googlenet(num_classes=8, aux_logits=True, init_weights=False)
    options = {"output": "logits", "auxiliary": {"aux_logits1": 0.3, "1": 0.5}, "alpha": 0.0}
    recognizer = Recognizer(network=FirstFrame(network), num_classes=8, **options)
    clips, labels = torch.zeros(2, 3, 1, 64, 64, dtype=torch.uint8), torch.tensor([1, 2])
    outputs = recognizer.train().outputs(clips)
    ways = [recognizer.objective(x, labels) for x in (outputs.logits, outputs.aux_logits1, outputs[1])]
    by_hand = ways[0] + 0.3 * ways[1] + 0.5 * ways[2]
    torch.testing.assert_close(recognizer.loss(outputs, labels), by_hand)
    assert recognizer.eval()(clips).shape == (2, 8)


class FirstFrame(nn.Module):
    """An image network on the first frame, its outputs as they are."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, clips):
        return self.network(clips[:, :, 0])


OWN = ["--model.width=null", "--model.dropout=0.5"]


def test_num_classes_without_a_default_is_the_models(motions, tmp_path):
    chosen = ["--model.network=experiments.own_examples.NeedsClasses", "--model.network.width=4"]
    words = [*small(motions, tmp_path / "run"), "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]
    done = run_tool("train_net.py", *words, *OWN, *chosen)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert load_trained(checkpoint).options["network"]["init_args"] == {"num_classes": 8, "width": 4}
    # The configuration's width and dropout are of the zoo's networks, so the checkpoint's are taken.
    tested = [word for word in small(motions, tmp_path / "run") if not word.startswith("--model.width")]
    done = run_tool("test_net.py", *tested, f"--ckpt={checkpoint}", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr


def test_a_network_without_arguments_is_tested(motions, tmp_path):
    words = [*small(motions, tmp_path / "run"), *OWN, "--model.network=experiments.own_examples.plain"]
    done = run_tool("train_net.py", *words, "--trainer.limit_train_batches=1", "--trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert "init_args" not in load_trained(checkpoint).options["network"]
    done = run_tool("test_net.py", *words, f"--ckpt={checkpoint}", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [long(0), 0.25])
def test_everything_works_from_the_checkpoint_alone(motions, tmp_path, alpha):
    chosen = ["--model.network=experiments.own_examples.TwoHeads", "--model.network.width=4", "--model.output=logits"]
    chosen += ['--model.auxiliary={"early": 0.3}', f"--model.alpha={alpha}", "--trainer.max_epochs=1"]
    words = [*small(motions, tmp_path / "whole"), *OWN, "--save_every_n_steps=2", "--keep_checkpoints=9"]
    done = run_tool("train_net.py", *words, *chosen)
    assert done.returncode == 0, done.stderr
    assert "network: experiments.own_examples.TwoHeads, alpha" in done.stdout
    folder = tmp_path / "whole" / "checkpoints"
    resumed = [*small(motions, tmp_path / "again"), *OWN, f"--ckpt_path={folder / 'step_00000002.ckpt'}"]
    done = run_tool("train_net.py", *resumed, *chosen)
    assert done.returncode == 0, done.stderr
    assert "taken from the checkpoint" not in done.stdout
    weights = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt")["state_dict"] for run in ("whole", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # The configuration of these names no network: it is the checkpoint's.
    checkpoint, unknown = folder / "last.ckpt", [*small(motions, tmp_path / "whole"), *OWN]
    done = run_tool("test_net.py", *unknown, f"--ckpt={checkpoint}", f"--output={tmp_path}", "--report")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "predictions.json").read_text())["videos"]) == 16
    assert "experiments.own_examples.TwoHeads" in (tmp_path / "report.html").read_text()
    video = next((motions / "val").glob("*.mp4"))
    done = run_tool("predict.py", video, f"--ckpt={checkpoint}", f"--json={tmp_path / 'p.json'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "p.json").read_text())["network"] == "experiments.own_examples.TwoHeads"
    done = run_tool("export.py", f"--ckpt={checkpoint}", f"--output={tmp_path / 'n.onnx'}", "--free=batch")
    assert done.returncode == 0, done.stderr
    assert "logits differ by" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.network=torch.nn.Linear"], "a class needs arguments that have no default: in_features"),
        (["--model.network=math.sqrt"], "model.network: Import path does not correspond to a subclass of Module"),
        (["--model.network=own_examples.Nope"], "model.network: Problem with given class_path 'own_examples.Nope'"),
        (["--model.network=torch.nn.Identity"], "Identity has no linear layer to give 8 classes to"),
        (
            ["--model.network=experiments.own_examples.TwoHeads"],
            "must give logits (B, 8), got Outputs; name the",
        ),
    ],
)
def test_a_mistake_is_one_line(motions, tmp_path, words, message):
    done = run_tool("train_net.py", *small(motions, tmp_path / "run"), *OWN, *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_create_model_builds_the_zoo_alone():
    with pytest.raises(UserError, match=r"no model 'own_examples.Tiny'"):
        create_model("own_examples.Tiny")
    assert TwoHeads().early.out_features == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "size", "options", "free"),
    [long(0, 64, ["--free=batch"], "batch from 1\n"), long(0.25, 32, [], "batch from 1, ")],
)
def test_a_network_whose_batch_norms_cannot_be_folded_is_exported_as_it_is(tmp_path, alpha, size, options, free):
    image = {"class_path": "timm.create_model", "init_args": {"model_name": "mobilenetv3_small_050"}}
    network = build_network("octvideo.models.own_network.FrameAverage", network=image)
    path = checkpoint_of(Recognizer(network=network, num_classes=8, alpha=alpha), tmp_path / "a.ckpt", size)
    done = run_tool("export.py", f"--ckpt={path}", f"--output={tmp_path / 'a.onnx'}", "--rounds=1", *options)
    assert done.returncode == 0, done.stderr
    assert "batch norms stay as they are: FrameAverage has no batch norm" in done.stdout
    assert f"free sizes: {free}" in done.stdout, done.stdout


class FixedBatch(nn.Module):
    """A network whose code makes a number of the batch size."""

    def __init__(self, num_classes: int = 8):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).reshape(int(x.shape[0]), 4, -1).mean(2))


def test_a_batch_that_is_a_number_in_the_code_is_one_line(tmp_path, capsys):
    network = build_network(f"{__name__}.FixedBatch")
    path = checkpoint_of(Recognizer(network=network, num_classes=8, alpha=0), tmp_path / "a.ckpt", 16)
    words = [f"--ckpt={path}", f"--output={tmp_path / 'a.pt2'}", "--rounds=1"]
    with pytest.raises(SystemExit):
        export.main(words)
    error = capsys.readouterr().err
    assert "FixedBatch cannot be exported with free sizes: Constraints violated (batch)" in error
    assert error.endswith("; name others by --free, or none\n")
    assert error.count("\n") == 1
    assert export.main([*words, "--free=none"]) == 0


def test_sizes_that_torch_cannot_leave_free_are_fixed(tmp_path, monkeypatch, capsys):
    trace, tried = export.trace, []

    def unsolved(module, clips, free, **options):
        tried.append(list(free))
        if "frames" in free:
            raise NotImplementedError("The inequality\ncannot be solved")
        return trace(module, clips, free, **options)

    monkeypatch.setattr(export, "trace", unsolved)
    network = build_network("own_examples.Tiny", width=4)
    path = checkpoint_of(Recognizer(network=network, num_classes=8, alpha=0.25), tmp_path / "a.ckpt", 16)
    words = [f"--ckpt={path}", f"--output={tmp_path / 'a.pt2'}", "--rounds=1"]
    export.main(words)
    assert tried == [["batch", "frames", "height", "width"], ["batch"]]
    assert "own_examples.Tiny fixes frames, height, width: torch.export cannot solve" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export.main([*words, "--free=batch,frames"])
    assert "cannot be exported with free sizes: The inequality cannot be solved" in capsys.readouterr().err


def test_a_record_is_checked_to_its_depth():
    inner = {"class_path": "os.system", "init_args": {"command": "exit 1"}}
    outer = "octvideo.models.own_network.FrameAverage"
    for arguments in ({"init_args": {"network": inner}}, {"init_args": {}, "dict_kwargs": {"network": inner}}):
        with pytest.raises(UserError, match=r"network os.system must be a subclass of nn.Module"):
            check_record({"class_path": outer, **arguments})
    check_record({"class_path": "own_examples.Tiny", "init_args": None})
