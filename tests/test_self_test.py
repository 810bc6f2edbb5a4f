"""The test of 16-bit convolutions that runs before a training."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from self_test import (
    QUANTITIES,
    TOLERANCE,
    Difference,
    SelfTest,
    compare,
    find_convolutions,
    known_faults,
)
from torch import nn
from torch.utils.data import DataLoader

from octvideo import Octaves, OctConv3d
from octvideo.data.preprocessing import Preprocessing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Network(nn.Sequential):
    """A stem, a first octave layer, two alike in the middle, and a last one."""

    def __init__(self):
        super().__init__(
            nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)),
            nn.BatchNorm3d(8),
            OctConv3d(8, 8, 3, padding=1, alpha=0.25),
            nn.Dropout(0.5),
            OctConv3d(8, 8, 3, padding=1, alpha=0.25),
            OctConv3d(8, 8, 3, padding=1, alpha=0.25),
            OctConv3d(8, 4, 1, alpha=0),
        )


def normal(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def compared(network, clips, dtype=torch.bfloat16):
    return [difference for kind in find_convolutions(network, clips) for difference in compare(kind, dtype, CPU)]


@pytest.fixture
def wrong(monkeypatch):
    """conv3d gives 10 % too much in bfloat16 where it has 3 input channels."""
    right = F.conv3d

    def wrong(x, weight, *rest):
        y = right(x, weight, *rest)
        return y * 1.1 if y.dtype == torch.bfloat16 and weight.shape[1] == 3 else y

    monkeypatch.setattr(F, "conv3d", wrong)


def test_layers_alike_are_one_kind_and_keep_the_shapes_they_run_with():
    kinds = find_convolutions(Network(), normal(2, 3, 4, 7, 9))
    assert [kind.name for kind in kinds] == ["0", "2", "4", "6"]
    assert kinds[0].input.shape == (2, 3, 4, 7, 9)
    assert kinds[2].input.high.shape == (2, 6, 4, 7, 9)
    assert kinds[2].input.low.shape == (2, 2, 4, 4, 5)
    assert [kind.conv3d_calls for kind in kinds[:3]] == [[(1, 4)], [(3, 4)], [(3, 4)]]
    assert kinds[3].conv3d_calls == []  # of one frame's kernel: 2-D


def test_inputs_of_another_size_or_layout_are_another_kind():
    layer = nn.Conv3d(4, 4, 1)
    network = nn.Sequential(layer, nn.MaxPool3d(2), layer)
    assert len(find_convolutions(network, normal(2, 4, 4, 4, 4))) == 2
    (kind,) = find_convolutions(layer, normal(2, 4, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d))
    assert kind.input.is_contiguous(memory_format=torch.channels_last_3d)


def test_the_network_and_the_random_generator_stay_as_they_were():
    network = Network()
    network[3].eval()
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    compared(network, normal(2, 3, 4, 6, 6))
    find_convolutions(nn.Sequential(network, Noise()), normal(2, 3, 4, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert all(parameter.grad is None for module in list(network)[1:] for parameter in module.parameters())
    assert [module.training for module in network] == [True, True, True, False, True, True, True]
    assert not any(module._forward_pre_hooks for module in network.modules())


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn(1)


class Stumbling(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def forward(self, clips):
        self.network(clips)
        raise ValueError("stumbled")


def test_a_network_that_fails_is_left_as_it_was():
    network = Stumbling()
    with pytest.raises(ValueError, match="stumbled"):
        find_convolutions(network, normal(2, 3, 4, 6, 6))
    assert all(module.training and not module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_convolutions_differ_by_rounding(dtype):
    differences = compared(Network(), normal(2, 3, 4, 8, 8), dtype)
    assert [difference.quantity for difference in differences] == [*QUANTITIES] * 4
    precision = torch.finfo(dtype).eps
    assert all(precision / 10 < difference.error < precision and difference.tolerable for difference in differences)


def test_a_wrong_kernel_is_named_with_its_error(wrong):
    differences = compared(Network(), normal(2, 3, 4, 8, 8))
    bad = [difference for difference in differences if not difference.tolerable]
    assert [(difference.layer, difference.quantity) for difference in bad] == [("0", name) for name in QUANTITIES]
    assert [difference.error for difference in bad] == pytest.approx([0.1] * 3, rel=0.05)


def test_the_worse_of_the_two_maps_counts():
    class WrongLow(OctConv3d):
        def forward(self, x):
            y = super().forward(x)
            return Octaves(y.high, y.low * math.nan) if y.dtype == torch.bfloat16 else y

    (kind,) = find_convolutions(WrongLow(8, 8, 1, alpha=0.25), normal(2, 8, 2, 4, 4))
    output = compare(kind, torch.bfloat16, CPU)[0]
    assert math.isnan(output.error)
    assert not output.tolerable


def test_the_tolerance_lies_between_rounding_and_faults():
    assert Difference("", "", TOLERANCE).tolerable
    assert not Difference("", "", 1.01 * TOLERANCE).tolerable


def faults(frames, kernel, monkeypatch, dtype=torch.bfloat16, device=CPU, capability="AVX512"):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layer = nn.Conv3d(3, 4, kernel, padding=tuple(length // 2 for length in kernel))
    return known_faults(find_convolutions(layer, normal(2, 3, frames, 4, 4)), dtype, device)


def test_a_kernel_longer_than_the_clip_is_named_on_a_cpu_in_bfloat16(monkeypatch):
    (fault,) = faults(4, (5, 1, 1), monkeypatch)
    assert "has a kernel of 5 frames for 4: oneDNN's bf16 weight gradient" in fault
    assert len(faults(2, (3, 3, 3), monkeypatch)) == 1
    assert faults(3, (3, 3, 3), monkeypatch) == []
    assert faults(1, (3, 3, 3), monkeypatch) == []
    assert faults(2, (3, 3, 3), monkeypatch, dtype=torch.float16) == []
    assert faults(2, (3, 3, 3), monkeypatch, capability="AVX2") == []


def test_a_layer_that_runs_as_a_2d_convolution_has_no_such_fault(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer = OctConv3d(8, 8, (5, 1, 1), padding=(2, 0, 0), alpha=0, channels_last=True)
    assert known_faults(find_convolutions(layer, normal(2, 8, 4, 4, 4)), torch.bfloat16, CPU) == []


@pytest.mark.parametrize(("version", "known"), [(90701, 0), (90800, 1), (91002, 1), (91500, 0), (None, 0)])
def test_releases_of_cudnn_with_wrong_3d_convolutions_are_known(monkeypatch, version, known):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    found = faults(4, (3, 3, 3), monkeypatch, device=CUDA)
    assert len(found) == known
    assert all(fault.startswith(f"cuDNN 9.{version // 100 % 100}.{version % 100} computes") for fault in found)
    assert faults(4, (3, 3, 3), monkeypatch) == []
    images = find_convolutions(nn.Conv2d(3, 4, 3), normal(2, 3, 4, 4))
    assert known_faults(images, torch.bfloat16, CUDA) == []


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def forward(self, clips):
        assert clips.shape == (2, 3, 4, 8, 8)
        assert clips.dtype == torch.uint8
        return self.network(clips / 255)

    def training_step(self, batch, index):
        return self.network(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(LightningDataModule):
    preprocessing = Preprocessing(clip_frames=4, crop_size=8)

    def train_dataloader(self):
        return DataLoader(normal(2, 3, 4, 8, 8), 2)


def fit(tmp_path, precision, callback=None):
    fp16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # the Trainer itself takes none on a CPU
    how = {"plugins": fp16} if precision == "16-mixed" else {"precision": precision}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[callback or SelfTest()],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **quiet,
        **how,
    )
    trainer.fit(Module(), datamodule=Data())


@pytest.mark.parametrize(("precision", "name"), [("bf16-mixed", "bf16"), ("16-mixed", "fp16")])
def test_a_training_in_16_bits_starts_with_a_line(tmp_path, capsys, precision, name):
    fit(tmp_path, precision)
    (line,) = [line for line in capsys.readouterr().out.split("\n") if "self-test" in line]
    assert line.startswith(f"self-test: 4 kinds of convolution agree in {name} within 0.")


def test_a_training_in_32_bits_starts_without(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("self_test.find_convolutions", None)
    fit(tmp_path, "32-true")
    assert "self-test" not in capsys.readouterr().out


def test_wrong_kernels_and_known_faults_are_warned_of(tmp_path, capsys, wrong, monkeypatch):
    monkeypatch.setattr("self_test.known_faults", lambda *arguments: ["somebody's fault"])
    with pytest.warns(UserWarning, match="self-test") as warnings:
        fit(tmp_path, "bf16-mixed")
    lines = [str(warning.message) for warning in warnings if "self-test" in str(warning.message)]
    assert lines[0] == "self-test: somebody's fault"
    assert [line.split(" is off by ")[0] for line in lines[1:]] == [
        f"self-test: network.0: its {quantity} in bf16" for quantity in QUANTITIES
    ]
    assert "agree" not in capsys.readouterr().out


def test_the_comparison_ends_in_time(tmp_path, capsys, monkeypatch):
    seconds = iter(range(0, 100, 20))
    monkeypatch.setattr("self_test.perf_counter", lambda: next(seconds))
    fit(tmp_path, "bf16-mixed", SelfTest(limit_seconds=50))
    assert "self-test: 2 kinds of convolution (of 4, in 50 s) agree in bf16" in capsys.readouterr().out


def test_other_processes_only_run_the_network(capsys, monkeypatch):
    monkeypatch.setattr("self_test.compare", None)
    monkeypatch.setattr("self_test.known_faults", None)
    ran = []
    module = Module()
    module.network[0].register_forward_hook(lambda *arguments: ran.append(1))
    plugin = SimpleNamespace(forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    trainer = SimpleNamespace(precision="bf16-mixed", datamodule=Data(), precision_plugin=plugin, is_global_zero=False)
    SelfTest().on_fit_start(trainer, module)
    assert ran == [1]
    assert capsys.readouterr().out == ""
