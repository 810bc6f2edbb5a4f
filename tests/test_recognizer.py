"""The recipe: schedule, parameter groups, scores."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octvideo.data.clips import BadVideo
from octvideo.data.loading import Batch
from octvideo.data.module import VideoData
from octvideo.data.multigrid import Multigrid
from octvideo.layers.normalization import SubBatchNorm
from octvideo.models.recomputation import RecomputedResBlock
from octvideo.training.recognizer import Recognizer


def small(**options):
    return Recognizer("c2d_r50", **{"alpha": 0.25, "num_classes": 4, "width": 8, **options})


def test_biases_and_batch_norms_have_no_weight_decay():
    recognizer = small()
    network, (decayed, others) = recognizer.network, recognizer.configure_optimizers().param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0)
    convolutions = [module.weight for module in network.modules() if isinstance(module, (nn.Conv3d, nn.Linear))]
    assert {id(p) for p in decayed["params"]} == {id(weight) for weight in convolutions}
    assert len(decayed["params"]) + len(others["params"]) == len(list(network.parameters()))


def test_a_network_starts_from_weights_that_its_checkpoints_do_not_name(tmp_path):
    torch.manual_seed(0)
    network = small().network
    torch.save(network.state_dict(), tmp_path / "x.pth")
    started = small(weights=str(tmp_path / "x.pth"))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), started.network.parameters(), strict=True))
    assert "weights" not in started.hparams


def test_checkpoints_record_every_option_with_the_names_of_version_0_1():
    network = {"depth": None, "dropout": 0.5, "frame_ratio": 4, "channel_ratio": 8, "downsample": "conv", "round_to": 1}
    training = {
        **{"freeze": None, "normalization": "batch", "sub_batch": None, "recompute": False, "compile": False},
        **{"learning_rate": 0.1, "reference_batch": 64, "batch_size": None, "warmup_start": 0.01, "warmup_epochs": 34},
        **{
            "milestones": None,
            "label_smoothing": 0.0,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "mean": 0.4,
            "std": 0.225,
        },
        "seed": 0,
    }
    later = {"fused_passes": False, "task": "single", "class_weights": None}  # that version 0.1 did not have
    later |= {
        "elastic": None,
        "network": None,
        "classes_argument": "num_classes",
        "skip": None,
        "output": None,
        "auxiliary": None,
    }
    later |= {"teacher": None, "teacher_weight": 0.5, "temperature": 2.0, "layer_decay": 1.0, "no_decay": None}
    given = {"name": "c2d_r50", "alpha": 0.25, "num_classes": 4, "width": 8}
    assert small(mean=0.4).hparams == given | network | training | later
    with pytest.raises(TypeError, match="alhpa"):
        small(alhpa=0.1)


def test_downsampling_reaches_the_network():
    kinds = {
        getattr(module, "downsample", "conv")
        for module in small(alpha=0, downsample="pool").network.modules()
        if isinstance(module, nn.Conv3d)
    }
    assert kinds == {"conv", "pool"}  # the stem strides in both


def test_clips_are_normalised_in_the_module():
    recognizer = small().eval()
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    wanted = recognizer.network((clips.float() / 255 - 0.45) / 0.225)
    torch.testing.assert_close(recognizer(clips), wanted)


def test_views_are_averaged_after_softmax_and_accuracies_counted():
    class Fixed(nn.Module):
        """Logits that are the first pixels of a clip."""

        def forward(self, x):
            return (x[:, 0, 0, 0, :4] * 0.225 + 0.45) * 255

    recognizer = small()
    recognizer.network = Fixed()
    logits = torch.tensor([[[9, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], [[0, 0, 5, 0], [0, 0, 5, 0], [0, 0, 0, 5]]])
    clips = torch.zeros(2, 3, 3, 1, 1, 4, dtype=torch.uint8)
    clips[:, :, 0, 0, 0] = logits.to(torch.uint8)
    batch = Batch(clips, torch.tensor([0, 3]), ["a", "b"], [BadVideo("c", "broken")], [(0, 0), (0, 1)])
    recognizer._trainer = type("Trainer", (), {"world_size": 1})()
    recognizer.on_test_epoch_start()
    recognizer.test_step(batch, 0)
    recognizer.test_step(Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [], [BadVideo("d", "gone")], []), 1)
    recognizer.on_test_epoch_end()
    results = recognizer.results
    assert [video["path"] for video in results["videos"]] == ["a", "b"]
    for video, rows in zip(results["videos"], logits, strict=True):
        torch.testing.assert_close(torch.tensor(video["scores"]), rows.float().softmax(1).mean(0))
    assert results["top1"] == 0.5  # "a" by its one sure view, "b" not
    assert results["clip_top1"] == pytest.approx(2 / 6)  # one of three views of each
    assert results["top5"] == results["clip_top5"] == 1  # four classes
    assert results["bad"] == [{"path": "c", "reason": "broken"}, {"path": "d", "reason": "gone"}]


def test_a_test_without_any_good_video_has_no_accuracy():
    recognizer = small()
    recognizer._trainer = type("Trainer", (), {"world_size": 1})()
    recognizer.on_test_epoch_start()
    recognizer.on_test_epoch_end()
    assert recognizer.results["top1"] is None
    assert recognizer.results["videos"] == []


def trainer_of(processes=1, accumulated=1, num_batches=100, **attributes):
    """What a recognizer asks a trainer in training; the first epoch."""
    values = {
        "max_epochs": 196,
        "max_steps": -1,
        "world_size": processes,
        "global_rank": 0,
        "accumulate_grad_batches": accumulated,
        "num_training_batches": num_batches,
        "limit_train_batches": 1.0,
        "current_epoch": 0,
        "datamodule": None,
        "strategy": None,
        "training": True,
    }
    return SimpleNamespace(**values | attributes)


def rates(recognizer, trainer, epochs):
    """The learning rates that the recognizer sets at epochs, which may be fractions."""
    recognizer._trainer = trainer
    optimizer = recognizer.configure_optimizers()
    trainer.optimizers, logged = [optimizer], []
    recognizer.log = lambda name, value: logged.append((name, value))
    recognizer.on_train_start()
    found = []
    for epoch in epochs:
        trainer.current_epoch, fraction = int(epoch), epoch % 1
        recognizer.on_train_batch_start(
            SimpleNamespace(clips=torch.empty(8, 1)), round(fraction * trainer.num_training_batches)
        )
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
    assert logged == [("learning_rate", rate) for rate in found]
    return found


# Twenty points; the scratch recipe: 0.01 to the cosine's 0.0929 in 34 epochs, then half a cosine of 0.1 to epoch 196.
COSINE_AT_34 = 0.05 * (1 + math.cos(math.pi * 34 / 196))
SCRATCH = {
    **{
        epoch: 0.01 + (COSINE_AT_34 - 0.01) * epoch / 34 for epoch in (0, 0.5, 1, 2.25, 5, 8.5, 17, 20, 25.5, 30, 33.75)
    },
    **{34: COSINE_AT_34, 49: 0.05 * (1 + math.sqrt(0.5)), 98: 0.05, 147: 0.05 * (1 - math.sqrt(0.5))},
    **{epoch: 0.05 * (1 + math.cos(math.pi * epoch / 196)) for epoch in (65.5, 100, 150.25, 180, 195.75)},
}
# From ImageNet: 0.01, a tenth of it from 150k of 300k steps on, a hundredth from 250k on.
IMAGENET = {
    **dict.fromkeys((0, 0.5, 1, 10, 20.5, 30, 40, 40.75), 0.01),
    **dict.fromkeys((41, 41.25, 45, 50, 60, 67, 68.25), 0.001),
    **dict.fromkeys((68.5, 70, 75, 80, 81.75), 0.0001),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("processes", [1, 4, 8])
@pytest.mark.parametrize("recipe", ["scratch", "imagenet"])
def test_the_recipes_learning_rates_on_any_number_of_devices(recipe, processes, accumulated):
    """8 clips in each process: rates in proportion to the clips of a step, at the same places in the run."""
    table, options, epochs = {
        "scratch": (SCRATCH, {}, 196),
        "imagenet": (IMAGENET, {"learning_rate": 0.01, "warmup_epochs": 0, "milestones": [41, 205 / 3]}, 82),
    }[recipe]
    assert len(table) == 20
    recognizer = small(batch_size=8, **options)
    trainer = trainer_of(processes, accumulated, num_batches=80, max_epochs=epochs)
    found = rates(recognizer, trainer, table)
    factor = 8 * processes * accumulated / 64
    assert found == pytest.approx([rate * factor for rate in table.values()], rel=1e-9)


def test_the_rate_changes_with_each_step_and_not_with_each_accumulated_batch():
    found = rates(small(warmup_epochs=0), trainer_of(accumulated=2, num_batches=4, max_epochs=1), (0, 0.25, 0.5, 0.75))
    assert found[0] == found[1] == pytest.approx(0.1)
    assert found[2] == found[3] == pytest.approx(0.05)


def test_multigrids_rates_follow_the_steps_and_grow_with_the_long_cycles_batch():
    """Of 40 steps 10 are in the first two epochs, of 8 times the clips, and 30 in the third one."""
    lengths, factors = [5, 5, 30], [8, 8, 1]
    data = VideoData(multigrid=Multigrid())
    data.batch_factor, data.batches_in_epoch = factors.__getitem__, lambda epoch: 2 * lengths[epoch]
    trainer = trainer_of(accumulated=2, num_batches=60, max_epochs=3, datamodule=data)
    found = rates(small(warmup_epochs=0), trainer, (0, 1, 2, 2.5))
    cosine = [0.05 * (1 + math.cos(math.pi * step / 40)) for step in (0, 5, 10, 25)]
    assert found == pytest.approx([8 * cosine[0], 8 * cosine[1], cosine[2], cosine[3]])
    data.batches_in_epoch = lambda epoch: 4 * lengths[epoch]
    trainer.limit_train_batches = 0.5
    assert rates(small(warmup_epochs=0), trainer, (2, 2.5)) == pytest.approx(cosine[2:])


def test_a_run_of_steps_has_its_schedule_in_them():
    recognizer = small(warmup_epochs=0, reference_batch=None, batch_size=8)
    found = rates(recognizer, trainer_of(processes=4, max_steps=50, num_batches=100), (0, 0.25))
    assert found == pytest.approx([0.1, 0.05])


def test_the_resolved_schedule_is_printed(caplog):
    caplog.set_level("INFO")
    rates(small(batch_size=8), trainer_of(processes=4, accumulated=4, num_batches=100), ())
    assert (
        "half a cosine from 0.2 to 0 over 196 epochs, warm-up from 0.02 in 34 epochs; scaled by 2 from 64"
        in caplog.text
    )
    assert "8 clips x 4 processes x 4 batches = 128 clips; an epoch: 25 steps" in caplog.text


@pytest.mark.parametrize(("warmup_epochs", "shortened"), [(1, False), (34, True)])
def test_a_warm_up_longer_than_the_run_is_shortened_with_a_warning(warmup_epochs, shortened, recwarn):
    found = rates(small(warmup_epochs=warmup_epochs), trainer_of(max_epochs=5), [k / 10 for k in range(13)])
    warnings = [str(warning.message) for warning in recwarn if "warm-up" in str(warning.message)]
    shown = (
        "a warm-up of 34 epochs does not fit into a run of 5: it takes a fifth of the run instead; set "
        "model.warmup_epochs"
    )
    assert warnings == [shown] * shortened
    assert found[:11] == sorted(found[:11])  # rises for an epoch
    assert found[12] < found[11] < found[10]


def test_a_schedule_without_an_end_is_refused():
    recognizer = small()
    recognizer._trainer = trainer_of(max_epochs=-1)
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        recognizer.on_train_start()


def place(epoch, batches=0):
    """A stand-in for Lightning's loop: so many epochs are over, and so many batches of the next one."""

    def progress(**counts):
        return SimpleNamespace(current=SimpleNamespace(**counts))

    epochs = progress(started=epoch + (batches > 0), processed=epoch)
    return SimpleNamespace(
        epoch_progress=epochs, epoch_loop=SimpleNamespace(batch_progress=progress(processed=batches))
    )


def test_a_number_of_steps_goes_on_with_other_batches_after_an_epoch():
    """Three epochs of 25 steps are over, and 75 of 375 steps; now an epoch has 100 steps: three more are to come."""
    recognizer = small(warmup_epochs=0)
    trainer = trainer_of(max_epochs=-1, max_steps=375, fit_loop=place(epoch=3), global_step=75)
    assert rates(recognizer, trainer, (3, 4.5)) == pytest.approx([0.05, 0.05 * (1 + math.cos(math.pi * 0.75))])
    trainer.fit_loop, trainer.global_step = place(epoch=4, batches=50), 225  # the same run, resumed
    assert rates(recognizer, trainer, (3, 4.5)) == pytest.approx([0.05, 0.05 * (1 + math.cos(math.pi * 0.75))])


def test_a_short_cycle_may_run_for_a_number_of_steps():
    data = VideoData(multigrid=Multigrid())
    data.batch_factor, data.batches_in_epoch = lambda epoch: 1, lambda epoch: 100
    recognizer = small(warmup_epochs=0)
    trainer = trainer_of(max_epochs=-1, max_steps=150, datamodule=data, fit_loop=place(epoch=0), global_step=0)
    found = rates(recognizer, trainer, (0, 0.75))
    assert found == pytest.approx([0.1, 0.05])


def test_dropout_depends_on_the_place_in_the_run_alone():
    recognizer = small()
    trainer = trainer_of(optimizers=[SimpleNamespace(param_groups=[])])
    recognizer._trainer = trainer
    recognizer.log = lambda name, value: None
    recognizer.on_train_start()
    drawn = []
    for epoch, batch, rank, noise in ((0, 3, 0, 0), (0, 3, 0, 7), (0, 4, 0, 0), (1, 3, 0, 0), (0, 3, 1, 0)):
        torch.rand(noise)
        trainer.current_epoch, trainer.global_rank = epoch, rank
        recognizer.on_train_batch_start(SimpleNamespace(clips=torch.empty(8, 1)), batch)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


def test_frozen_parts_keep_weights_and_statistics():
    recognizer = small(freeze=["blocks.0", r"blocks\.1\.res_blocks\.0"], width=8).train()
    network = recognizer.network
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen == [
        name for name, _ in network.named_parameters() if name.startswith(("blocks.0.", "blocks.1.res_blocks.0."))
    ]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = recognizer.configure_optimizers()
    assert sum(len(group["params"]) for group in optimizer.param_groups) + len(frozen) == len(
        list(network.parameters())
    )
    recognizer(torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("blocks.0.", "blocks.1.res_blocks.0.")) for name in changed)
    assert any("running_mean" in name for name in changed)


def test_sub_batches_have_the_clips_of_a_batch_at_full_size():
    """In training, and in batches of another size that batch-norm statistics are estimated from."""
    recognizer = small(normalization="sub", batch_size=4).train()
    norms = [module for module in recognizer.network.modules() if isinstance(module, SubBatchNorm)]
    assert len(norms) == 53
    for clips, splits in ((8, 2), (3, 1), (12, 3), (4, 1)):
        recognizer(torch.zeros(clips, 3, 2, 32, 32, dtype=torch.uint8))
        assert {norm.num_batches_tracked.item() for norm in norms} == {splits}
        for norm in norms:
            norm.reset_running_stats()


def test_recomputed_blocks_and_compiled_networks_are_switched_on():
    recognizer = small(recompute=True, compile=True)
    assert sum(isinstance(module, RecomputedResBlock) for module in recognizer.network.modules()) == 16
    recognizer._trainer = trainer_of(training=False)
    recognizer.configure_model()
    assert recognizer.network._compiled_call_impl is None  # testing does not pay for it
    recognizer._trainer = trainer_of()
    recognizer.configure_model()
    assert recognizer.network._compiled_call_impl is not None


def test_blocks_are_compiled_where_that_is_asked():
    recognizer = small(compile="blocks")
    recognizer._trainer = trainer_of()
    recognizer.configure_model()
    compiled = [name for name, part in recognizer.network.named_modules() if part._compiled_call_impl is not None]
    assert len(compiled) == 16
    assert all(".res_blocks." in name for name in compiled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"warmup_epochs": -1}, "warmup_start and warmup_epochs at least 0"),
        ({"weight_decay": -1}, "weight_decay must be at least 0, got -1"),
        ({"milestones": [3, 2]}, r"epochs above 0 in ascending order, got \[3, 2\]"),
        ({"label_smoothing": 1}, r"label_smoothing must lie in \[0, 1\), got 1"),
        ({"batch_size": 0}, "model.batch_size must be at least 1, got 0"),
        ({"freeze": ["stem"]}, "model.freeze 'stem' matches no part of the network"),
        ({"freeze": ["("]}, r"model.freeze '\(' is an invalid regex: missing \)"),
        ({"sub_batch": 0}, "model.sub_batch must be at least 1, got 0"),
        ({"reference_batch": -1}, "model.reference_batch must be at least 1, got -1"),
        ({"momentum": 1.0}, "momentum must lie between 0 and 1"),
        ({"std": 0}, "std must be positive, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"weights": "nothing.pth"}, "nothing.pth: no such file"),
        ({"channel_ratio": 0}, "frame_ratio and channel_ratio must be at least 1, got 4 and 0"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_mixed_labels_give_the_shared_cross_entropy_and_count_the_larger_share():
    recognizer = small().train()
    recognizer.log = lambda name, value, **options: None
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 1, 0]])
    recognizer.network = nn.Sequential(nn.Flatten(), nn.Identity())
    recognizer.outputs = lambda clips: logits
    clips = torch.zeros(2, 2, 3, 1, 1, 1, dtype=torch.uint8)  # two views of two videos
    shares = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 0.4, 0.6]])
    batch = Batch(clips, shares, ["a", "b"], [], [(0, 0), (0, 1)])
    loss = recognizer.training_step(batch, 0)
    by_hand = -(shares.repeat_interleave(2, 0) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, by_hand)
    assert recognizer.train_top1.compute().item() == pytest.approx(0.25)
    recognizer.train_top1.reset()
    whole = recognizer.training_step(batch._replace(labels=torch.tensor([0, 2])), 0)
    torch.testing.assert_close(whole, nn.functional.cross_entropy(logits, torch.tensor([0, 0, 2, 2])))
    assert recognizer.train_top1.compute().item() == pytest.approx(0.75)


def test_smoothed_labels_give_the_smoothed_cross_entropy():
    recognizer = small(label_smoothing=0.2).train()
    recognizer.log = lambda name, value, **options: None
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0]])
    recognizer.outputs = lambda clips: logits
    clips = torch.zeros(2, 1, 3, 1, 1, 1, dtype=torch.uint8)
    loss = recognizer.training_step(Batch(clips, torch.tensor([0, 3]), ["a", "b"], [], [(0, 0), (0, 1)]), 0)
    shares = torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]])
    torch.testing.assert_close(loss, -(shares * logits.log_softmax(1)).sum(1).mean())


def test_a_network_frozen_whole_is_refused():
    with pytest.raises(ValueError, match="freezes the whole network"):
        small(freeze=["blocks"]).configure_optimizers()
