"""torch.compile, block by block: which blocks, how often, and the same results."""

import copy
import pickle
import sys

import pytest
import torch
import torchvision
from conftest import settle, small
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from octvideo import create_model
from octvideo.commands import test as test_command
from octvideo.layers.octaves import Octaves
from octvideo.layers.pending import Pending
from octvideo.models.compilation import compile_blocks, compile_network
from octvideo.models.recomputation import recompute

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def every_test_compiles_anew():
    torch._dynamo.reset()


def compiled(network):
    return [name for name, module in network.named_modules() if module._compiled_call_impl is not None]


def stage(alpha=0.25):
    """Three residual blocks, two of them alike: from a tensor to octaves."""
    torch.manual_seed(0)
    return settle(create_model("i3d_r50", alpha=alpha, width=8, dropout=0).blocks[1])


def train(network, x, bf16=False):
    """Gradients and statistics after a step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = network(x)
    sum(part.square().mean() for part in (y if isinstance(y, tuple) else (y,))).backward()
    found = dict(network.named_buffers()) | {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    return found


def error(found, wanted):
    """The relative error of all tensors together."""
    found, wanted = (torch.cat([x[name].double().flatten() for name in wanted]) for x in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("alpha", "recomputed", "bf16"), [(0, True, False), (0.25, False, False), (0.25, True, False), (0.25, False, True)]
)
def test_compiled_blocks_train_as_those_that_are_not(alpha, recomputed, bf16):
    network = stage(alpha).train()
    exact = copy.deepcopy(network).double()
    if recomputed:
        recompute(network)
    other, counter = copy.deepcopy(network), CompileCounterWithBackend("aot_eager")
    assert compile_blocks(network, backend=counter) == 2
    x = torch.randn(2, 8, 2, 8, 8)
    for _ in range(2):
        found, eager, wanted = train(network, x, bf16), train(other, x, bf16), train(exact, x.double())
        assert error(found, wanted) < 2 * error(eager, wanted) + 1e-5
    assert counter.frame_count == 2  # for three blocks


def test_other_shapes_share_code():
    block = stage().res_blocks[0]
    other, counter = copy.deepcopy(block), CompileCounterWithBackend("eager")
    compile_blocks(nn.Sequential(block), backend=counter)
    counts = []
    for shape in ((2, 4, 16, 16), (3, 6, 24, 24), (4, 8, 32, 32), (5, 4, 8, 12), (2, 4, 16, 16)):
        x = torch.randn(shape[0], 8, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(list(block(x)), list(other(x)))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


def test_blocks_take_octaves_that_wait_to_be_made():
    block = stage().res_blocks[1]
    other = copy.deepcopy(block)
    assert compile_blocks(nn.Sequential(block), backend="eager") == 1
    maps = torch.randn(2, 24, 2, 8, 8), torch.randn(2, 8, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(list(block(Pending.of_maps(maps[0], None, maps[1]))), list(other(Octaves(*maps))))


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: create_model("i3d_r50", alpha=0.25, width=8), 16),
        (lambda: create_model("i3d_r50_nonlocal", width=8), 16),
        (lambda: create_model("slowfast_r50", width=16, alpha=0.25), 32),
        (lambda: create_model("x3d_s", width=8), 26),
        (torchvision.models.resnet50, 16),
    ],
    ids=["i3d", "non-local", "slowfast", "x3d", "torchvision"],
)
def test_residual_blocks_are_found(make, blocks):
    with torch.device("meta"):
        network = make()
    assert 1 < compile_blocks(network) < blocks
    names = compiled(network)
    assert len(names) == blocks
    assert len({type(network.get_submodule(name)).__name__.removeprefix("NonLocal") for name in names}) == 1


def test_names_stay_and_copies_are_not_compiled():
    network = stage()
    names = list(network.state_dict())
    compile_network(network, "blocks")
    assert compiled(network) == [f"res_blocks.{i}" for i in range(3)]
    assert list(network.state_dict()) == names
    assert compiled(copy.deepcopy(network)) == compiled(pickle.loads(pickle.dumps(network))) == []


@pytest.mark.parametrize(("how", "parts"), [(False, []), (None, []), (True, [""]), ("true", [""])])
def test_a_network_is_compiled_as_a_whole_or_not_at_all(how, parts):
    network = stage()
    compile_network(network, how)
    assert compiled(network) == parts


def test_a_network_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="Sequential has no repeated blocks to compile"):
        compile_blocks(nn.Sequential(nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 1)))


def test_a_test_compiles_what_its_own_option_says(trained, motions, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "argv", ["octvideo"])
    monkeypatch.setattr(test_command, "compile_network", lambda network, how: asked.append(how))
    checkpoint = f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}"
    options = [*small(motions, tmp_path), f"--data.test_list={motions / 'val.csv'}", "--model.compile=true"]
    for option in ("--compile=blocks", "--compile=true", "--trainer.accelerator=cpu"):
        test_command.Testing("", [*options, checkpoint, option], keep_options=False)
    assert asked == ["blocks", True, False]
