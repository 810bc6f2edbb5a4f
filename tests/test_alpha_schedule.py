"""Alpha over training: a staircase that ends at the model's own alpha, wherever a run stops and goes on."""

import csv

import pytest
import torch
import torch.nn.functional as F
from alpha_schedule import AlphaSchedule
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pytorchvideo.models.resnet import ResStage
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from octvideo import create_model
from octvideo.models.zoo import set_alpha

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_BATCHES = 4


class Module(LightningModule):
    """A small network with one block a stage, and all that it was run at."""

    def __init__(self, alpha=0.25, name="i3d_r50", accumulate=1):
        super().__init__()
        self.save_hyperparameters()
        seed_everything(0, verbose=False)
        self.network = create_model(name, alpha=alpha, width=8, num_classes=3, dropout=0.0, channels_last=True)
        self.stages = [block for block in self.network.blocks if isinstance(block, ResStage)]
        for stage in self.stages:
            stage.res_blocks = stage.res_blocks[:1]
        self.trained, self.validated = [], []

    def alphas(self):
        return tuple(stage.res_blocks[0].branch2.conv_b.alpha for stage in self.stages)

    def training_step(self, batch, batch_idx):
        clips, labels = batch
        loss = F.cross_entropy(self.network(clips), labels)
        self.trained.append(self.alphas()[0])
        return loss

    def validation_step(self, batch, batch_idx):
        self.network(batch[0])
        self.validated.append(self.alphas()[0])

    def train_dataloader(self):
        clips = torch.randn(2 * NUM_BATCHES, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(clips, torch.arange(2 * NUM_BATCHES) % 3), 2)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(2, 3, 4, 16, 16), torch.zeros(2).long()), 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def trainer_with(folder, *callbacks, epochs=3, **options):
    options = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options}
    return Trainer(
        callbacks=list(callbacks),
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def logged(logger, *names):
    """The values of the rows of metrics.csv that have them."""
    with open(logger.experiment.metrics_file_path) as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file) if row[names[0]]]


def test_alpha_is_a_staircase_from_start_to_target():
    def alphas(start, target):
        schedule = AlphaSchedule(start, 3, begin_epoch=1, num_steps=4)
        return [schedule.alpha_at(k / 4, target) for k in range(14)]

    steps = [0.5] * 6 + [0.4375] * 2 + [0.375] * 2 + [0.3125] * 2 + [0.25] * 2
    assert alphas(0.5, 0.25) == steps
    assert alphas(0.0, 1.0) == [0] * 6 + [0.25] * 2 + [0.5] * 2 + [0.75] * 2 + [1] * 2


def test_steps_are_not_late_by_rounding_and_the_target_is_exact():
    assert int(0.3 / 1.5 * 5) == 0  # and not 1
    assert AlphaSchedule(0.5, 1.5, num_steps=5).alpha_at(0.3, 0.0) == 0.4
    assert AlphaSchedule(0.7, 0.7, begin_epoch=0.1, num_steps=6).alpha_at(0.7, 0.1) == 0.1


def test_one_alpha_and_four_meet_stage_by_stage():
    schedule = AlphaSchedule([0.5, 0.25, 0, 0], 1, num_steps=2)
    assert schedule.alpha_at(0.5, 0.25) == (0.375, 0.25, 0.125, 0)
    assert AlphaSchedule(0.5, 1, num_steps=2).alpha_at(0.5, [0, 0, 0, 0.5]) == (0.25, 0.25, 0.25, 0.25)
    assert AlphaSchedule(0.5, 1, num_steps=2).alpha_at(0.5, 0.25) == 0.375


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.5, "end_epoch": 1}, r"start of the alpha schedule: alpha must lie in \[0, 1\], got 1.5"),
        ({"start": [0.5, 0.5], "end_epoch": 1}, "start of the alpha schedule: .* got 2"),
        ({"start": 0.5, "end_epoch": 2, "begin_epoch": 2}, "below end_epoch, got 2 and 2"),
        ({"start": 0.5, "end_epoch": 2, "begin_epoch": -1}, "begin_epoch of at least 0 .* got -1 and 2"),
        ({"start": 0.5, "end_epoch": 2, "num_steps": 0}, "num_steps .* at least 1, got 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaSchedule(**options)


def test_training_goes_down_the_staircase_and_validates_and_logs_on_the_way(tmp_path):
    module = Module()
    logger = CSVLogger(tmp_path)
    schedule = AlphaSchedule(0.5, 1.5, begin_epoch=0.5, num_steps=2)
    trainer = trainer_with(tmp_path, schedule, logger=logger, log_every_n_steps=1, num_sanity_val_steps=1)
    trainer.fit(module)
    assert module.trained == [0.5] * 4 + [0.375] * 2 + [0.25] * 6
    assert module.validated == [0.5, 0.5, 0.25, 0.25]  # the first one is Lightning's trial
    assert module.alphas() == (0.25, 0.25, 0.25, 0)
    assert [alpha for (alpha,) in logged(logger, "alpha")] == module.trained


def test_four_alphas_are_set_and_logged_stage_by_stage(tmp_path):
    module, logger = Module([0.0, 0.0, 0.5, 0.5]), CSVLogger(tmp_path)
    schedule = AlphaSchedule(0.5, 1, num_steps=1)
    trainer = trainer_with(tmp_path, schedule, logger=logger, log_every_n_steps=1, limit_train_batches=1, epochs=2)
    trainer.fit(module)
    stages = [f"alpha/res{k}" for k in (2, 3, 4, 5)]
    assert logged(logger, *stages) == [[0.5, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]
    assert module.alphas() == (0, 0, 0.5, 0.5)


def test_alpha_changes_only_between_optimiser_steps(tmp_path):
    module = Module()
    schedule = AlphaSchedule(0.5, 0.25, num_steps=1)
    trainer_with(tmp_path, schedule, epochs=1, accumulate_grad_batches=2, limit_val_batches=0).fit(module)
    assert module.trained == [0.5, 0.5, 0.25, 0.25]


def test_a_run_that_goes_on_is_where_it_was(tmp_path):
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = Module()
    trainer_with(tmp_path, AlphaSchedule(0.5, 2), checkpoints, **options).fit(whole)
    expected = [0.5] * 2 + [0.4375] * 2 + [0.375] * 2 + [0.3125] * 2 + [0.25] * 4
    assert whole.trained == expected
    for step in (3, 4, 6):  # in the middle of an epoch, at its end, where alpha changes
        path = tmp_path / f"step={step}.ckpt"
        assert torch.load(path, weights_only=True)["hyper_parameters"]["alpha"] == 0.25
        resumed = Module()
        trainer_with(tmp_path, AlphaSchedule(0.5, 2), **options).fit(resumed, ckpt_path=path, weights_only=True)
        assert resumed.trained == expected[step:]


def test_a_validation_that_was_interrupted_goes_on_at_its_alpha(tmp_path):
    class Saving(Module):
        def validation_step(self, batch, batch_idx):
            if self.trainer.global_step == 6:  # in the middle of the second epoch
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")
            super().validation_step(batch, batch_idx)

    runs = [Saving(), Module()]
    for module, options in zip(runs, ({}, {"ckpt_path": tmp_path / "middle.ckpt", "weights_only": True}), strict=True):
        schedule = AlphaSchedule(0.5, 2, num_steps=8)
        trainer_with(tmp_path, schedule, val_check_interval=2).fit(module, **options)
    whole, resumed = runs
    assert whole.validated == [0.46875, 0.40625, 0.34375, 0.28125, 0.25, 0.25]
    assert resumed.validated == whole.validated[2:]
    assert resumed.trained == whole.trained[6:]


def test_the_average_of_the_weights_is_run_at_the_networks_alpha(tmp_path):
    module = Module()
    average = EMAWeightAveraging(decay=0.5)
    trainer_with(tmp_path, average, AlphaSchedule(0.5, 1, num_steps=1), epochs=2).fit(module)
    assert module.validated == [0.5, 0.25]
    assert module.alphas() == (0.25, 0.25, 0.25, 0)
    averaged = dict(average._average_model.module.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, averaged[name], rtol=0, atol=0)


def test_a_compiled_network_is_compiled_again_for_each_alpha(tmp_path):
    graphs, outputs = [], []

    def backend(graph, inputs):
        graphs.append(module.network.blocks[1].res_blocks[0].alpha)
        return graph.forward

    class Compiled(Module):
        def training_step(self, batch, batch_idx):
            outputs.append(self.network(batch[0]))
            torch.testing.assert_close(outputs[-1], self.network.forward(batch[0]))  # which is not compiled
            return outputs[-1].sum()

    module = Compiled()
    for stage in module.stages:
        stage.res_blocks = nn.ModuleList([nn.Conv3d(8, 8, 1)])  # torch.compile takes a second for each block
    module.network.blocks[-1].proj = nn.Linear(8, 3)
    set_alpha(module.network, 0.25).compile(backend=backend)
    trainer = trainer_with(
        tmp_path, AlphaSchedule(0.5, 1, num_steps=1), epochs=2, limit_train_batches=2, limit_val_batches=0
    )
    # Of its own accord torch.compile stops at a number of codes: here a second one would be an error.
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        trainer.fit(module)
    assert graphs == [0.5, 0.25]
    assert len(outputs) == 4


def test_alphas_that_the_network_cannot_take_are_refused_before_the_first_step(tmp_path):
    module = Module(0.0, name="csn_r101")
    convolution = module.network.blocks[2].res_blocks[0].branch2.conv_b
    assert convolution.groups == convolution.in_channels
    convolution.groups = 4  # of 16 channels
    with pytest.raises(ValueError, match=r"alpha 0.125 of the alpha schedule: blocks.2.* groups 4 must divide both"):
        trainer_with(tmp_path, AlphaSchedule(0.25, 1, num_steps=2)).fit(module)
    assert module.trained == []
    assert module.alphas() == (0, 0, 0, 0)
    AlphaSchedule(0.5, 1, num_steps=2).check(module.network, 0.0)


def test_elastic_training_has_no_schedule(tmp_path):
    module = Module()
    module.hparams["elastic"] = {"alphas": [0, 0.5]}
    with pytest.raises(ValueError, match=r"an alpha schedule and model\.elastic both set alpha"):
        trainer_with(tmp_path, AlphaSchedule(0.5, 1)).fit(module)


@pytest.mark.parametrize(
    "options", [{"epochs": 2}, {"epochs": -1, "max_steps": 8}, {"epochs": 2, "accumulate_grad_batches": 2}]
)
def test_a_schedule_longer_than_the_training_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="before the end of the training, 2 epochs: got 2"):
        trainer_with(tmp_path, AlphaSchedule(0.5, 2), **options).fit(Module())


def test_a_trial_run_and_a_loader_of_unknown_length_may_end_before(tmp_path):
    schedule = AlphaSchedule(0.5, 2)
    for _ in range(2):  # it starts again with each fit
        trainer = trainer_with(tmp_path, schedule, fast_dev_run=1)
        trainer.fit(module := Module())
        assert module.trained == [0.5]
        trainer.validate(module, verbose=False)
        assert module.validated == [0.5, 0.25]
        assert module.alphas() == (0.25, 0.25, 0.25, 0)

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(3, 4, 16, 16), 0)] * 2)

    trainer = trainer_with(tmp_path, AlphaSchedule(0.5, 2, num_steps=2), limit_val_batches=0)
    trainer.fit(module := Module(), DataLoader(Endless(), 2))
    assert module.trained == [0.5, 0.375, 0.25]


def test_a_schedule_needs_a_models_alpha_that_is_no_mapping():
    network = create_model("i3d_r50", num_classes=2, width=8, alpha={"conv_a": 0.5})
    with pytest.raises(ValueError, match=r"needs a model\.alpha of one number or four, got one for each layer"):
        AlphaSchedule(0.5, 2).check(network, {"conv_a": 0.5})
