"""Precise batch norm: the statistics of all clips, alone, in processes, and in training."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import in_two_processes
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from test_normalization import Net, assert_equal, clips, snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from octvideo.errors import UserError
from octvideo.layers.normalization import normalize
from octvideo.layers.octaves import Octaves
from octvideo.training.precise_bn import PreciseBatchNorm, estimate_statistics, match_statistics, watch


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


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1])
def test_matched_statistics_give_what_the_original_gives(alpha):
    original, model, batch = Net(0), Net(alpha), 3 * clips(6) + 1  # not what its statistics are of
    estimate_statistics(original, [clips(8, 1)], original)
    match_statistics(model, original, [batch], lambda network, clip: network(clip))
    found = []
    seen = watch(original, [batch], lambda network, clip: network(clip))
    before = snapshot(model)
    (output,) = match_statistics(model, seen, [batch], lambda network, clip: network(clip))
    assert_equal(snapshot(model), before)
    torch.testing.assert_close(model.eval()(batch), output, rtol=1e-4, atol=1e-4)  # as in the pass that matched it
    for network in (original, model):
        network.eval().norm.register_forward_hook(lambda _, inputs, output: found.append(vanilla_rows(output.detach())))
        network(batch)
    for wanted, channel in zip(*found, strict=True):
        torch.testing.assert_close(channel.mean(), wanted.mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(channel.std(correction=0), wanted.std(correction=0), rtol=1e-3, atol=1e-3)


def test_matched_statistics_of_an_equal_network_stay_and_batches_count_together():
    original = Net(0)
    estimate_statistics(original, [clips(8, 1)], original)
    model, other = copy.deepcopy(original), Net(0.5)
    other.load_state_dict(original.state_dict())
    batches = [3 * clips(2) + 1, 2 * clips(2, 1)]
    match_statistics(model, original, batches, lambda network, clip: network(clip))
    for name, x in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], x, rtol=1e-5, atol=1e-6)
    halves = copy.deepcopy(other)
    match_statistics(other, original, [torch.cat(batches)], lambda network, clip: network(clip))
    match_statistics(halves, original, batches, lambda network, clip: network(clip))
    for key in ("running_mean", "running_var"):  # of the first norm, which sees the same either way
        torch.testing.assert_close(halves.norm.get_buffer(key), other.norm.get_buffer(key), rtol=1e-4, atol=1e-5)


def test_matching_that_cannot_be_leaves_all_as_it_was():
    original, model = Net(0), Net(0.5).train()
    before = snapshot(model)

    def forward(network, clip):
        network(clip)
        if network is model:
            raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        match_statistics(model, original, [clips(2)], forward)
    assert_equal(snapshot(model), before)
    assert all(module.training for module in model.modules())
    assert not model.norm._forward_pre_hooks
    assert not original.norm._forward_pre_hooks
    match_statistics(model, original, [], forward)
    match_statistics(normalize(model, "frozen"), normalize(original, "frozen"), [clips(2)], lambda *_: None)
    assert_equal(snapshot(model), before)
    seen = watch(Net(0), [clips(2)], lambda network, clip: network(clip))
    with pytest.raises(UserError, match="norm runs more often in a forward pass than the original's"):
        match_statistics(Net(0.5), seen, [clips(2)], lambda network, clip: [network(clip), network(clip)])
    with pytest.raises(UserError, match="batch norms of only one of the two: head, norm, unused"):
        match_statistics(Net(0.5), nn.Conv3d(1, 1, 1), [], forward)


BATCHES = [clips(2, 0), clips(0), clips(2, 2), clips(2, 3)]  # the second process': clips(2, 4), clips(2, 5) ...


def others():
    return [clips(2, 4), clips(2, 5), clips(2, 6)]  # ends first


def in_process(rank):
    found = {}
    for kind in ("batch", "sync"):
        model = normalize(Net(), kind)
        count = estimate_statistics(model, others() if rank else BATCHES, model)
        found[kind] = count, snapshot(model)
    return found


def test_two_processes_estimate_what_one_does(tmp_path):
    ranks = in_two_processes(in_process, folder=tmp_path)
    model = Net()
    together = [BATCHES[0], others()[0], BATCHES[2], others()[2]]  # not where one had none, nor when one had ended
    wanted = reference(model, together)
    for found in ranks:
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
    assert capsys.readouterr().out.count(" s an epoch for the statistics of 8 clips\n") == 1  # of two epochs


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
