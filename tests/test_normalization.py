"""Batch norm of all processes, of parts of a batch, and frozen."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import in_two_processes
from pytorchvideo.models.resnet import ResBlock
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from octvideo.layers.convolution import OctConv3d
from octvideo.layers.normalization import FrozenBatchNorm, SubBatchNorm, SyncedBatchNorm, normalize
from octvideo.layers.octaves import Octaves
from octvideo.models.recomputation import recompute

KINDS = {"sync": SyncedBatchNorm, "sub": SubBatchNorm, "frozen": FrozenBatchNorm}


def clips(batch, seed=0, size=7):
    return 3 + 2 * torch.randn(batch, 3, 2, size, size, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Batch norms on Octaves and on a Tensor, one that nothing runs through, and dropout between."""

    def __init__(self, alpha=0.5):
        super().__init__()
        torch.manual_seed(1)
        self.stem = OctConv3d(3, 6, 3, padding=1, alpha=alpha)
        self.norm = nn.BatchNorm3d(6)
        self.drop = nn.Dropout(0.5)
        self.last = OctConv3d(6, 5, 3, padding=1, alpha=0)
        self.head = nn.BatchNorm3d(5)
        self.unused = nn.BatchNorm2d(2)
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        x = self.drop(F.relu(self.norm(self.stem(x))))
        return self.linear(F.relu(self.head(self.last(x))).mean((2, 3, 4)))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_norm_is_replaced_and_restored(kind):
    model = Net()
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    assert normalize(model, kind) is model
    assert sum(type(module) is KINDS[kind] for module in model.modules()) == 3
    assert_equal(snapshot(model), before)
    assert type(pickle.loads(pickle.dumps(model)).head) is type(copy.deepcopy(model).head) is KINDS[kind]
    other = "sub" if kind != "sub" else "frozen"
    normalize(model, other)
    assert type(model.unused) is KINDS[other]
    normalize(model, "batch")
    assert [type(module) for module in model.modules()] == classes
    assert vars(model.norm).keys() == vars(Net().norm).keys()
    model(clips(2)).sum().backward()
    assert model.norm.weight.grad is not None
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("kind", ["sync", "sub"])
def test_one_process_and_one_part_are_plain_batch_norm(kind):
    model, plain = normalize(Net(), kind), Net()
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        torch.manual_seed(0)
        found = model(clips(4))
        torch.manual_seed(0)
        assert torch.equal(found, plain(clips(4)))
    assert_equal(snapshot(model), snapshot(plain))


PIECES = {
    "tensor": torch.randn(5, 6, 2, 4, 4),
    "octaves": Octaves(torch.randn(5, 4, 2, 4, 4), torch.randn(5, 2, 2, 2, 2)),
    "octaves of two pieces": Octaves(torch.randn(5, 3, 2, 4, 4), torch.randn(5, 3, 2, 2, 2), ((1, 2), (2, 1))),
}


@pytest.mark.parametrize("x", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize(("splits", "sizes"), [(2, (3, 2)), (4, (2, 2, 1)), (9, (1, 1, 1, 1, 1))])
def test_sub_batch_norm_is_batch_norm_of_the_parts_one_after_the_other(x, splits, sizes):
    sub, plain = normalize(nn.BatchNorm3d(6), "sub"), nn.BatchNorm3d(6)
    sub.splits = splits  # may change during training
    maps = x if isinstance(x, Octaves) else (x,)
    parts = list(zip(*(map_.split(sizes) for map_ in maps), strict=True))
    wanted = [plain(Octaves(*part, x.parts) if isinstance(x, Octaves) else part[0]) for part in parts]
    found = sub(x)
    for i, map_ in enumerate(found if isinstance(x, Octaves) else (found,)):
        assert torch.equal(map_, torch.cat([(y.high, y.low)[i] if isinstance(x, Octaves) else y for y in wanted]))
    assert not isinstance(x, Octaves) or found.parts == x.parts
    assert_equal(snapshot(sub), snapshot(plain))
    assert sub.num_batches_tracked == len(sizes)
    found, wanted = sub.eval()(x), plain.eval()(x)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("x", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize(("clips_per_part", "splits"), [(1, 5), (2, 2), (3, 1), (9, 1)])
def test_the_clips_of_a_part_say_how_many_parts_a_batch_has(x, clips_per_part, splits):
    counted = normalize(nn.BatchNorm3d(6), "sub", clips_per_part=clips_per_part)
    cut = normalize(nn.BatchNorm3d(6), "sub", splits)
    found, wanted = counted(x), cut(x)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert counted.num_batches_tracked == cut.num_batches_tracked == splits
    assert "clips_per_part" not in vars(normalize(counted, "batch"))


def test_sub_batch_norm_keeps_channels_last():
    x = torch.randn(4, 6, 2, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    for features in (x, Octaves(x, x[..., :2, :2].contiguous(memory_format=torch.channels_last_3d))):
        y = normalize(nn.BatchNorm3d(features.shape[1]), "sub", 2)(features)
        for map_ in y if isinstance(y, Octaves) else (y,):
            assert map_.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_frozen_network_does_not_train_its_batch_norms():
    model = Net()
    model.norm.bias.requires_grad = False
    model.unused.eval()
    normalize(normalize(model, "frozen"), "frozen")
    model.train()
    model.unused.eval()
    before = snapshot(model)
    model(clips(2)).sum().backward()
    assert not any(model.get_submodule(name).training for name in ("norm", "head", "unused"))
    assert all(model.get_submodule(name).weight.grad is None for name in ("norm", "head"))
    assert model.stem.weight.grad is not None
    assert_equal(snapshot(model), before)
    normalize(model, "batch")
    assert (model.norm.weight.requires_grad, model.norm.bias.requires_grad) == (True, False)
    assert (model.norm.training, model.unused.training) == (True, False)


def test_freezing_in_evaluation_thaws_in_evaluation():
    assert not normalize(normalize(Net().eval(), "frozen"), "batch").norm.training


class Activated(nn.BatchNorm3d):
    def forward(self, x):
        return F.relu(super().forward(x))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.BatchNorm3d(2), ("layer",), "one of batch, sync, sub, frozen, got 'layer'"),
        (nn.BatchNorm3d(2), ("sub", 0), "splits must be at least 1"),
        (nn.BatchNorm3d(2), ("sync", 2), 'got 2 for "sync"'),
        (nn.BatchNorm3d(2), ("sub", 1, 0), "clips_per_part must be at least 1"),
        (nn.BatchNorm3d(2), ("sync", 1, 2), 'clips_per_part must .* got 2 for "sync"'),
        (nn.Sequential(nn.BatchNorm3d(2), Activated(2)), ("sub",), "1 is a Activated, which normalises in its own way"),
        (nn.BatchNorm3d(2, track_running_stats=False), ("frozen",), "the model has no running statistics"),
    ],
)
def test_what_cannot_be_replaced_is_an_error_and_changes_nothing(model, arguments, message):
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        normalize(model, *arguments)
    assert [type(module) for module in model.modules()] == classes


class Block(nn.Module):
    """A residual block around `Net`'s middle, which can be recomputed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = OctConv3d(3, 6, 3, padding=1, alpha=0.5)
        inner = nn.Sequential(nn.BatchNorm3d(6), nn.ReLU(), OctConv3d(6, 6, 3, padding=1, alpha=0.5), nn.BatchNorm3d(6))
        self.block = ResBlock(branch2=inner, branch_fusion=torch.add, activation=nn.ReLU())
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(self.block(self.stem(x)).mean((2, 3, 4)))


def gradients(model, x, share=1.0):
    (model(x).square().sum() * share).backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def in_process(rank):
    found = {}
    for recomputed in (False, True):
        model = normalize(Block(), "sync")
        if recomputed:
            recompute(model)
        parallel = DistributedDataParallel(model)
        found[recomputed] = gradients(parallel, clips(4).chunk(2)[rank]), snapshot(model)
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_two_processes(in_process, folder=tmp_path_factory.mktemp("processes"))


def test_synced_batch_norm_of_two_processes_is_that_of_the_whole_batch(two_processes):
    model = Block()
    wanted = gradients(model, clips(4), share=0.5)  # DDP averages over processes
    for found in two_processes:
        torch.testing.assert_close(found[False][0], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[False][1], snapshot(model), rtol=1e-5, atol=1e-6)


def test_recomputed_synced_batch_norms_are_the_same_bit_for_bit(two_processes):
    for found in two_processes:
        for again, once in zip(found[True], found[False], strict=True):
            assert_equal(again, once)
