"""octavize(net, .25) with no other option on kinds of networks that people have, and what PyTorch does with them."""

import copy
import logging
from collections.abc import Mapping
from functools import cache

import onnxruntime
import pytest
import torch
from conftest import in_two_processes, long, settle
from kinds import DETECTORS, KINDS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from octvideo import octavize
from octvideo.models.cost import count_macs_of
from octvideo.models.outputs import octaves_in

COMPILED = {"tsm", "hf_resnet", "attention", "lora"}  # and exported, by make test-long

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def network_and_input(name):
    """A vanilla network as its library initialises it, not to be changed, and its forward's arguments."""
    torch.manual_seed(0)
    build, shape = KINDS[name]
    network, x = build(), torch.randn(shape)
    return network, (list(x),) if name in DETECTORS else (x,)


def octave(name):
    network, arguments = network_and_input(name)
    return octavize(copy.deepcopy(network), 0.25), arguments


def tensors(output):
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def described(output):
    """An output's types, keys and shapes."""
    if isinstance(output, Mapping):
        return type(output), {key: described(value) for key, value in output.items()}
    return type(output), output.shape if isinstance(output, Tensor) else [described(value) for value in output]


def loss_of(network, arguments, name):
    """What a detector finds wrong with its boxes, or the distance of all outputs from fixed random ones."""
    torch.manual_seed(0)  # a detector draws those that it trains on
    if name in DETECTORS:
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 30.0, 60.0, 50.0]])
        return sum(network(*arguments, [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2).values())
    outputs = tensors(network(*arguments))
    return sum((x.float() - torch.randn(x.shape)).square().mean() for x in outputs)


def with_gradients(network):
    return {name: x.grad for name, x in network.named_parameters() if x.grad is not None}


def assert_close(outputs, wanted, share=1e-4):
    """Differences are small against the largest value."""
    outputs, wanted = tensors(outputs), tensors(wanted)
    assert len(outputs) == len(wanted)
    for x, y in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=share * max(1e-3, y.abs().max().item()), check_dtype=False)


@pytest.mark.parametrize("name", KINDS)
def test_trains(name):
    vanilla, arguments = network_and_input(name)
    vanilla = copy.deepcopy(vanilla).train()
    loss_of(vanilla, arguments, name).backward()
    network = octave(name)[0].train()
    optimizer = torch.optim.SGD(network.parameters(), 0.02)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 3 and name not in DETECTORS):
            loss = loss_of(network, arguments, name)
        loss.backward()
        assert with_gradients(network).keys() == with_gradients(vanilla).keys()
        nn.utils.clip_grad_norm_(network.parameters(), 1, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_outputs_are_what_they_were_for_less_and_alpha_0_restores(name):
    vanilla, arguments = network_and_input(name)
    network = settle(copy.deepcopy(vanilla))
    keys, kinds, wanted = list(network.state_dict()), [type(part) for part in network.modules()], network(*arguments)
    macs = count_macs_of(lambda: network(*arguments))
    output = octavize(network, 0.25)(*arguments)
    assert described(output) == described(wanted)
    assert not octaves_in(output)
    assert count_macs_of(lambda: network(*arguments)) < (0.95 if name == "standardised" else 0.88) * macs
    if name not in DETECTORS:
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(network(*arguments), output, 0.05)
    assert list(octavize(network, 0).state_dict()) == keys
    assert [type(part) for part in network.modules()] == kinds
    for x, want in zip(tensors(network(*arguments)), tensors(wanted), strict=True):
        assert torch.equal(x, want)


def run_in_onnxruntime(path, x):
    session = onnxruntime.InferenceSession(path)
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["unet", "conv_lstm", *map(long, sorted(COMPILED | {"lstm", "googlenet"}))])
def test_exports_and_runs_in_onnxruntime(name, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("onnxscript"), "level", logging.ERROR)
    network, arguments = octave(name)
    with torch.no_grad():
        wanted = settle(network)(*arguments)
        program = torch.export.export(network, arguments, strict=False)
        assert_close(program.module()(*arguments), wanted)
    if name == "googlenet":  # onnxscript takes 40 s to optimize its many branches
        torch.onnx.export(network, arguments, tmp_path / "network.onnx", dynamo=False, opset_version=18)
    else:
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "network.onnx")
    assert_close(run_in_onnxruntime(tmp_path / "network.onnx", *arguments), wanted)


class OneImage(nn.Module):
    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, image):
        found = self.detector([image])[0]
        return found["boxes"], found["scores"], found["labels"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["ssd", "faster_rcnn"])
@torch.no_grad()
def test_detectors_run_in_onnxruntime(name, tmp_path):
    """By way of TorchScript: their choice of boxes stops torch.export, vanilla too."""
    network, (images,) = octave(name)
    image, detector = images[0], OneImage(settle(network)).eval()
    torch.onnx.export(detector, (image,), tmp_path / "detector.onnx", dynamo=False, opset_version=18)
    assert_close(run_in_onnxruntime(tmp_path / "detector.onnx", image), detector(image))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_lstm", "parametrized", *map(long, sorted(COMPILED | {"unet"}))])
def test_compiles_without_graph_breaks_in_training(name):
    torch._dynamo.reset()
    network, arguments = octave(name)
    other = copy.deepcopy(settle(network))  # whose statistics stay
    loss_of(network, arguments, name).backward()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    loss_of(compiled, arguments, name).backward()
    gradients = with_gradients(network)
    assert with_gradients(other).keys() == gradients.keys()
    assert_close([with_gradients(other)[key] for key in gradients], list(gradients.values()))


def compare_data_parallel(rank):
    network, (clips,) = octave("conv_lstm")
    settle(network)(clips).square().mean().backward()
    parallel = DistributedDataParallel(copy.deepcopy(network))
    parallel.zero_grad()
    parallel(clips[rank : rank + 1]).square().mean().backward()
    assert_close([x.grad for x in parallel.parameters()], list(with_gradients(network).values()))


@pytest.mark.long
@pytest.mark.slow
def test_data_parallel_equals_one_process(tmp_path):
    in_two_processes(compare_data_parallel, folder=tmp_path)
