"""The recipe: schedule, parameter groups, scores."""

import math

import pytest
import torch
from torch import nn

from octvideo.data.dataset import BadVideo, Batch
from octvideo.recognizer import Recognizer, learning_rate_at, parameter_groups


def small(**options):
    return Recognizer("c2d_r50", **{"alpha": 0.25, "num_classes": 4, "width": 8, **options})


def test_the_scratch_recipes_learning_rate_by_hand():
    """196 epochs of 100 steps, 34 of warm-up from 0.01 to where the cosine from 0.1 is then."""
    end = 0.1 * 0.5 * (1 + math.cos(math.pi * 34 / 196))
    table = {0: 0.01, 1700: (0.01 + end) / 2, 3400: end, 9800: 0.05, 14700: 0.1 * 0.5 * (1 - math.sqrt(0.5)), 19600: 0}
    for step, rate in table.items():
        assert learning_rate_at(step, 19600, 3400, 0.1, 0.01) == pytest.approx(rate, abs=1e-12)


def test_without_warm_up_the_cosine_starts_at_its_peak():
    assert learning_rate_at(0, 100, 0, 0.1, 0.01) == pytest.approx(0.1)


def test_biases_and_batch_norms_have_no_weight_decay():
    network = small().network
    decayed, others = parameter_groups(network, 1e-4)
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


@pytest.mark.parametrize(("warmup_epochs", "shortened"), [(1, False), (34, True)])
def test_a_warm_up_longer_than_the_run_is_shortened_with_a_warning(warmup_epochs, shortened, recwarn):
    recognizer = small(warmup_epochs=warmup_epochs)
    recognizer._trainer = type(
        "Trainer", (), {"estimated_stepping_batches": 50, "num_training_batches": 10, "accumulate_grad_batches": 1}
    )()
    scheduler = recognizer.configure_optimizers()["lr_scheduler"]["scheduler"]
    (factor, _) = scheduler.lr_lambdas
    warnings = [str(warning.message) for warning in recwarn if "warm-up" in str(warning.message)]
    assert warnings == (["a warm-up of 34 epochs does not fit into 5: it takes a fifth of the run instead; set "
                         "model.warmup_epochs"] if shortened else [])  # fmt: skip
    assert [factor(step) for step in range(10)] == sorted(factor(step) for step in range(10))  # rises for ten steps
    assert factor(11) < factor(10)


def test_a_schedule_without_an_end_is_refused():
    recognizer = small()
    recognizer._trainer = type("Trainer", (), {"estimated_stepping_batches": float("inf")})()
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        recognizer.configure_optimizers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"warmup_epochs": -1}, "warmup_epochs and weight_decay at least 0"),
        ({"momentum": 1.0}, "momentum must lie between 0 and 1"),
        ({"std": 0}, "std be positive"),
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
    logged = {}
    recognizer.log = lambda name, value, **options: logged.update({name: value})
    recognizer.optimizers = lambda: type("Optimizer", (), {"param_groups": [{"lr": 0.1}]})()
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 1, 0]])
    recognizer.network = nn.Sequential(nn.Flatten(), nn.Identity())
    recognizer.forward = lambda clips: logits
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
