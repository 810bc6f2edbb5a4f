import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from pytorchvideo.models.resnet import ResBlock
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from octvideo.layers.convolution import OctConv3d
from octvideo.layers.normalization import FrozenBatchNorm, SubBatchNorm, SyncedBatchNorm, normalize
from octvideo.layers.octaves import Octaves
from octvideo.models.recomputation import recompute
from octvideo.training.precise_bn import PreciseBatchNorm, estimate_statistics

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


def vanilla_rows(x):
    """(C, cells) of each channel's own map."""
    if isinstance(x, Octaves):
        return [*x.high.transpose(0, 1).flatten(1), *x.low.transpose(0, 1).flatten(1)]
    return list(x.transpose(0, 1).flatten(1))


def reference(model, batches, dtype=torch.float64):
    """Mean and variance of all that reaches each batch norm, normalised meanwhile by each batch's own, in float64."""
    model = copy.deepcopy(model).to(dtype).eval()
    rows = {}
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            norm.train()

            def note(module, inputs, name=name):
                rows.setdefault(name, []).append(vanilla_rows(inputs[0].detach()))

            norm.register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in batches:
            model(batch.to(dtype))
    found = {}
    for name, calls in rows.items():
        channels = [torch.cat([call[c] for call in calls]) for c in range(len(calls[0]))]
        found[name] = [
            torch.stack([x.double().mean() for x in channels]),
            torch.stack([x.double().var() for x in channels]),
        ]
    return found


def assert_estimated(model, wanted, tolerance=1e-5):
    for name, (mean, var) in wanted.items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("sizes", [(6,), (4, 0, 2, 3)])
def test_statistics_are_those_of_all_clips(alpha, sizes):
    model = Net(alpha)
    batches = [clips(size, seed) for seed, size in enumerate(sizes)]
    assert estimate_statistics(model, batches, model) == sum(sizes)
    assert_estimated(model, reference(model, [batch for batch in batches if len(batch)]))


def test_sub_batches_are_normalised_as_in_training():
    model = normalize(Net(), "sub", 2)
    plain = Net()
    estimate_statistics(model, [clips(2, 0), clips(4, 1)], model)
    assert_estimated(model, reference(plain, [*clips(2, 0).chunk(2), *clips(4, 1).chunk(2)]))


def test_statistics_under_autocast_are_those_of_what_batch_norm_reads():
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        estimate_statistics(model, [clips(4)], model)
        wanted = reference(model, [clips(4)], torch.float32)
    assert_estimated(model, wanted)
    assert model.norm.running_mean.dtype == torch.float32


def test_estimating_changes_nothing_but_the_statistics():
    model = Net().train()
    model.norm.eval()
    normalize(model.head, "frozen")
    before, modes = snapshot(model), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    batch = SimpleNamespace(clips=clips(4).unflatten(0, (2, 2)))
    assert estimate_statistics(model, DataLoader([batch], batch_size=None), lambda b: model(b.clips.flatten(0, 1))) == 4
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"norm.running_mean", "norm.running_var"}
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.norm.track_running_stats
    assert not model.norm._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failing_forward_pass_leaves_the_network_as_it_was():
    model = Net().train()
    before = snapshot(model)

    def forward(batch):
        model(batch)
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        estimate_statistics(model, [clips(2)], forward)
    assert_equal(snapshot(model), before)
    assert all(module.training for module in model.modules())
    assert model.norm.track_running_stats
    assert not model.norm._forward_pre_hooks


def test_a_compiled_network_is_estimated_too():
    model = Net()
    model.compile(backend="eager")
    model.train()(clips(2))
    estimate_statistics(model, [clips(4)], model)
    plain = Net()
    assert_estimated(model, reference(plain, [clips(4)]))


def test_statistics_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="need clips"):
        estimate_statistics(Net(), [clips(0)], Net())
    with pytest.raises(ValueError, match="Conv3d has no batch norm"):
        estimate_statistics(nn.Conv3d(1, 1, 1), [clips(1)], Net())
    with pytest.raises(ValueError, match="frozen"):
        estimate_statistics(normalize(Net(), "frozen"), [clips(1)], Net())


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


BATCHES = [clips(2, 0), clips(0), clips(2, 2), clips(2, 3)]  # the second process': clips(2, 4), clips(2, 5) ...


def others():
    return [clips(2, 4), clips(2, 5), clips(2, 6)]  # ends first


def in_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for recomputed in (False, True):
        model = normalize(Block(), "sync")
        if recomputed:
            recompute(model)
        parallel = DistributedDataParallel(model)
        found[recomputed] = gradients(parallel, clips(4).chunk(2)[rank]), snapshot(model)
    for kind in ("batch", "sync"):
        model = normalize(Net(), kind)
        count = estimate_statistics(model, others() if rank else BATCHES, model)
        found[kind] = count, snapshot(model)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(in_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


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


def test_two_processes_estimate_what_one_does(two_processes):
    model = Net()
    together = [BATCHES[0], others()[0], BATCHES[2], others()[2]]  # not where one had none, nor when one had ended
    wanted = reference(model, together)
    for found in two_processes:
        assert found["batch"][0] == found["sync"][0] == 8
        model.load_state_dict(found["batch"][1])
        assert_estimated(model, wanted)
        model.load_state_dict(found["sync"][1])
        assert_estimated(model, reference(Net(), [torch.cat(together[:2]), torch.cat(together[2:])]))


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Net(0.5)

    def forward(self, x):
        return self.network(x.float() / 64)

    def training_step(self, batch, index):
        return self(batch.clips.flatten(0, 1)).square().mean()

    def validation_step(self, batch, index):
        self.validated = snapshot(self)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def videos(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [
        SimpleNamespace(clips=torch.randint(256, (2, 2, 3, 2, 7, 7), generator=generator, dtype=torch.uint8))
        for _ in range(count)
    ]


def loader(seed, count):
    return DataLoader(videos(seed, count), batch_size=None)


class Data(LightningDataModule):
    def __init__(self, validates=True):
        super().__init__()
        self.asked = []
        self.validates = validates

    def train_dataloader(self):
        return loader(0, 3)

    def val_dataloader(self):
        return loader(1, 1) if self.validates else []

    def statistics_dataloader(self, epoch, num_batches):
        self.asked.append((epoch, num_batches))
        return loader(10 + epoch, num_batches + 1)  # one too many

    def on_after_batch_transfer(self, batch, index):
        return SimpleNamespace(clips=batch.clips // 2)  # an augmentation that statistics must not see


class Saved(Callback):
    """The checkpoint of each epoch's end."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, module):
        self.states.append(copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint()["state_dict"]))


def fit(data, *callbacks, ckpt=None, epochs=2, **options):
    torch.manual_seed(0)
    module = Module()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return trainer, module


def statistics_of(state, epoch, num_batches=2):
    """The reference for the weights in a checkpoint."""
    module = Module()
    module.load_state_dict(state)
    batches = [batch.clips.flatten(0, 1) / 64 for batch in videos(10 + epoch, num_batches)]
    return {f"network.{name}": wanted for name, wanted in reference(module.network, batches).items()}, module


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("validates", [False, True])
def test_checkpoints_hold_the_statistics_of_the_weights_that_are_evaluated(validates, averaged, order, capsys):
    data, precise, saved = Data(validates), PreciseBatchNorm(2), Saved()
    average = [EMAWeightAveraging(decay=0.5)] if averaged else []
    callbacks = [*average, precise] if order == "after" else [precise, *average]
    _, module = fit(data, *callbacks, saved)
    assert data.asked == [(0, 2), (1, 2)]  # once an epoch, and not in the sanity check
    for epoch, state in enumerate(saved.states):
        wanted, holder = statistics_of(state, epoch)
        assert_estimated(holder, wanted)
    if validates:
        assert_equal(module.validated, saved.states[-1])
    assert_equal(snapshot(module), saved.states[-1])  # the end of fit keeps the average
    assert capsys.readouterr().out.count("precise BN: statistics of 8 clips in ") == 2


def test_training_goes_as_it_does_without():
    runs = []
    for callbacks in ((), (PreciseBatchNorm(1),)):
        average = EMAWeightAveraging(decay=0.5)
        _, module = fit(Data(), *callbacks, average)
        runs.append({name: value for name, value in snapshot(module).items() if "running" not in name})
    assert_equal(*runs)


class Seeds(Callback):
    """Dropout as a function of the step, and a checkpoint in the middle of the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, index):
        torch.manual_seed(trainer.global_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


class Rest(Data):
    """The training batches after that checkpoint; Lightning wants as many as an epoch has, and takes two."""

    def train_dataloader(self):
        return DataLoader([*videos(0, 3)[1:], None], batch_size=None)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_resumed_run_ends_with_the_same_statistics_bit_for_bit(averaged, tmp_path):
    def callbacks():
        average = [EMAWeightAveraging(decay=0.5)] * averaged
        return *average, PreciseBatchNorm(1), Seeds(tmp_path / "step.ckpt")

    _, whole = fit(Data(), *callbacks())
    data = Rest()
    _, resumed = fit(data, *callbacks(), ckpt=tmp_path / "step.ckpt")
    assert data.asked == [(1, 1)]
    assert_equal(snapshot(resumed), snapshot(whole))


def test_precise_batch_norm_says_what_it_lacks():
    with pytest.raises(ValueError, match="num_batches of at least 1, got 0"):
        PreciseBatchNorm(0)

    class Plain(LightningDataModule):
        def train_dataloader(self):
            return loader(0, 1)

    with pytest.raises(ValueError, match=r"statistics_dataloader\(epoch, num_batches\), got Plain"):
        fit(Plain(), PreciseBatchNorm())
    trainer, module = Trainer(logger=False, accelerator="cpu"), Module()
    normalize(module, "frozen")
    with pytest.raises(ValueError, match="Module has no batch norm"):
        PreciseBatchNorm().setup(trainer, module, "fit")
