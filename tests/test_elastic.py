"""Elastic training: one network for several alphas, trained, resumed, deployed, and switched under load."""

import copy
import csv
import json
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import run_processes, run_tool, settle, small
from lightning.pytorch import Trainer
from own_examples import Tiny
from test_resume import fault, tensors
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo import create_model
from octvideo.commands import stream
from octvideo.data.loading import Batch
from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import UserError
from octvideo.evaluation import budget as budget_module
from octvideo.evaluation import prediction
from octvideo.evaluation.budget import HEADROOM, PATIENCE, Budget
from octvideo.models.checkpoint import Trained, load_trained
from octvideo.models.elastic import AlphaPlans
from octvideo.models.zoo import set_alpha
from octvideo.training.recognizer import Recognizer
from octvideo.training.sharding import FullyShardedStrategy

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHAS = [0.0, 0.25, 0.5]
STEM = nn.Sequential(nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 4))  # nothing else
LABELS = ["a", "b", "c", "d"]


def recognizer(elastic=None, **options):
    """In training, with a random state that training would have; what it logs is in `logged`."""
    torch.manual_seed(0)
    given = {"name": "c2d_r50", "alpha": 0.25, "num_classes": 4, "width": 8, "dropout": 0.0, "downsample": "pool"}
    if "network" in options:
        given = {"alpha": 0.25, "num_classes": 4}
    module = Recognizer(**given | {"elastic": {"alphas": ALPHAS} | (elastic or {})} | options)
    torch.manual_seed(1)
    settle(module.network)
    own = module.elastic.statistics.of(module.elastic.own)
    for each in map(module.elastic.statistics.of, module.elastic.others):
        for rows, values in zip(each, own, strict=True):
            for row, value in zip(rows, values, strict=True):
                row.copy_(value)
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: value})
    module.log_dict = lambda values, **_: module.logged.update(values)
    module._trainer = SimpleNamespace(current_epoch=0, world_size=1)
    return module.train()


def batch_of(labels):
    clips = torch.randint(0, 256, (len(labels), 1, 3, 4, 32, 32), generator=torch.Generator().manual_seed(1))
    return Batch(clips.to(torch.uint8), labels, ["x"] * len(labels), [], [(0, 0)] * len(labels))


def statistics(network):
    return [buffer.clone() for x in network.modules() if isinstance(x, _BatchNorm) for buffer in x.buffers()]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("network", [None, Tiny(num_classes=4)])
@pytest.mark.parametrize("task", ["single", "soft", "multi"])
def test_a_step_adds_the_losses_of_the_largest_network_and_of_those_drawn(network, task):
    own = {} if network is None else {"network": copy.deepcopy(network)}
    module = recognizer({"drawn": 2, "temperature": 2.0}, task="multi" if task == "multi" else "single", **own)
    alone = copy.deepcopy(module.network)
    labels = {"single": torch.tensor([0, 3, 1]), "soft": torch.eye(4)[:3] / 2 + 0.125, "multi": torch.eye(4)[:3]}[task]
    batch = batch_of(labels)
    before = {alpha: [x.clone() for each in module.elastic.statistics.of(alpha) for x in each] for alpha in ALPHAS}
    loss = module.training_step(batch, 0)
    loss.backward()

    clips, logits = module.preprocessing.normalize(batch.clips.flatten(0, 1)), {}
    for alpha in ALPHAS:
        copied = copy.deepcopy(alone)
        set_alpha(copied, alpha)
        for norm in copied.modules():  # so that the gradients go to the same weights
            norm._parameters |= {name: alone_parameter(alone, copied, norm, name) for name in norm._parameters}
        logits[alpha] = copied.train()(clips)
        found = [x for each in module.elastic.statistics.of(alpha) for x in each]
        for ours, theirs in zip(found, statistics(copied), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert not equal(found, before[alpha])
    first = F.binary_cross_entropy_with_logits if task == "multi" else F.cross_entropy
    wanted = first(logits[0.0], labels)
    for alpha in (0.25, 0.5):
        taught, teacher = logits[alpha] / 2, logits[0.0].detach() / 2
        if task == "multi":
            scores = 4 * F.binary_cross_entropy_with_logits(taught, teacher.sigmoid())
        else:
            scores = 4 * F.kl_div(taught.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        wanted = wanted + (scores + first(logits[alpha], labels)) / 2
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(module.network.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))
    assert all(alpha in (0, 0.25) for alpha in alphas_of(module.network))  # outside of the step it is model.alpha's


def alone_parameter(alone, copied, module, name):
    place = next(place for place, each in copied.named_modules() if each is module)
    return alone.get_submodule(place)._parameters[name]


def alphas_of(network):
    return {module.alpha for module in network.modules() if hasattr(module, "alpha")}


def test_only_networks_that_ran_update_their_statistics():
    module = recognizer()
    (drawn,) = module.elastic.draw(0, 0, 0)
    before = {alpha: [x.clone() for each in module.elastic.statistics.of(alpha) for x in each] for alpha in ALPHAS}
    module.training_step(batch_of(torch.tensor([0, 1])), 0).backward()
    for alpha in ALPHAS:
        same = equal([x for each in module.elastic.statistics.of(alpha) for x in each], before[alpha])
        assert same == (alpha not in (0, drawn))


def test_a_teacher_teaches_the_largest_and_labels_may_teach_the_others(tmp_path):
    plain = recognizer(elastic={"teacher_weight": 0.25})
    taught = recognizer(elastic={"teacher_weight": 0.25}, teacher=str(written(recognizer(), tmp_path / "teacher.ckpt")))
    batch = batch_of(torch.tensor([0, 1, 2]))
    losses = [module.training_step(batch, 0) for module in (plain, taught)]
    others = [module.logged["train/loss_of_others"] for module in (plain, taught)]
    assert torch.equal(*others)
    # The teacher has the same weights, and is in evaluation mode.
    assert losses[0] - others[0] != losses[1] - others[1]
    (alpha,) = plain.elastic.draw(0, 0, 0)
    with torch.no_grad(), plain.elastic.at(0.0):
        teacher = plain(batch.clips.flatten(0, 1))
    with torch.no_grad(), plain.elastic.at(alpha):
        logits = plain(batch.clips.flatten(0, 1))
    distance = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(others[0], 0.25 * distance + 0.75 * F.cross_entropy(logits, batch.labels))


def test_sharded_networks_cannot_change_alpha_within_a_step():
    module = recognizer()
    module.trainer = Trainer(accelerator="cpu", strategy=FullyShardedStrategy(), logger=False, barebones=True)
    with pytest.raises(UserError, match="changes alpha within a step: leave out --trainer"):
        module.configure_model()


def test_draws_depend_on_the_position_alone_and_the_smallest_is_in_every_second():
    elastic = recognizer({"alphas": [0.0, 0.125, 0.25, 0.5]}).elastic
    drawn = [elastic.draw(3, 1, batch) for batch in range(32)]
    assert drawn == [elastic.draw(3, 1, batch) for batch in range(32)]
    assert drawn != [elastic.draw(3, 2, batch) for batch in range(32)]
    assert drawn != [elastic.draw(4, 1, batch) for batch in range(32)]
    assert Counter(alpha for draw in drawn for alpha in draw) == {0.125: 8, 0.25: 8, 0.5: 16}
    assert len({tuple(drawn[n : n + 3][k][0] for k in range(3)) for n in range(0, 30, 3)}) > 2
    two = [recognizer({"alphas": [0.0, 0.125, 0.25, 0.5], "drawn": 2}).elastic.draw(3, 1, batch) for batch in range(8)]
    assert {len(draw) for draw in two} == {2}
    assert Counter(alpha for draw in two for alpha in draw) == {0.125: 4, 0.25: 4, 0.5: 8}
    assert recognizer({"alphas": [0.0, 0.25]}).elastic.draw(3, 1, 5) == [0.25]


def test_stages_may_have_alphas_of_their_own():
    module = recognizer({"per_stage": True, "drawn": 2})
    drawn = [mapping for batch in range(60) for mapping in module.elastic.draw(0, 0, batch)]
    assert len(drawn) == 120
    assert {len(mapping) for mapping in drawn} == {3}
    assert len(set(drawn)) == 26  # of 27, without the largest network
    before = {alpha: [x.clone() for each in module.elastic.statistics.of(alpha) for x in each] for alpha in ALPHAS}
    module.training_step(batch_of(torch.tensor([0, 1])), 0).backward()
    for alpha in ALPHAS:  # mappings leave no statistics
        same = equal([x for each in module.elastic.statistics.of(alpha) for x in each], before[alpha])
        assert same == (alpha != 0)
    clips = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad(), module.elastic.at((0.0, 0.5, 0.25)):
        found = module.network.eval()(clips)
    set_alpha(module.network, [0.0, 0.5, 0.25, 0.0])
    assert torch.equal(found, module.network(clips))


@pytest.mark.parametrize("network", [create_model("i3d_r50", width=8, num_classes=4), Tiny()])
def test_prepared_plans_compute_what_set_alpha_does(network):
    if isinstance(network, Tiny):
        network.octave_options = {"channels_last": None, "skip": (), "downsample": "conv", "round_to": 1}
    settle(network)
    clips, wanted = torch.randn(2, 3, 4, 32, 32), {}
    with torch.no_grad():
        for alpha in ALPHAS:
            wanted[alpha] = set_alpha(copy.deepcopy(network), alpha)(clips)
        plans = AlphaPlans(network, [0.25, 0.5, 0.0])
        assert torch.equal(network(clips), wanted[0.25])
        for alpha in (0.0, 0.5, 0.25, 0.0):
            plans.switch(alpha)
            torch.testing.assert_close(network(clips), wanted[alpha])


def test_the_networks_own_names_stay():
    module, plain = recognizer(), Recognizer("c2d_r50", alpha=0.25, num_classes=4, width=8)
    assert list(module.network.state_dict()) == list(plain.network.state_dict())
    added = set(module.state_dict()) - set(plain.state_dict())
    assert added == {f"elastic.statistics.{name}" for name in ("means", "variances", "counts")}
    assert module.hparams["elastic"]["alphas"] == ALPHAS


def test_validation_scores_every_alpha():
    module = recognizer().eval()
    batch = batch_of(torch.tensor([0, 1, 2, 3]))
    module.validation_step(batch, 0)
    for alpha, name in ((0.25, "val/top1"), (0.0, "val/top1_alpha_0"), (0.5, "val/top1_alpha_0.5")):
        with torch.no_grad(), module.elastic.at(alpha):
            hits = module(batch.clips.flatten(0, 1)).argmax(1) == batch.labels
        assert module.logged[name].compute() == hits.float().mean()


def written(module, path):
    """A checkpoint of a module, as training writes it, with other statistics at each alpha."""
    for alpha in ALPHAS:
        for mean, var, _ in module.elastic.statistics.of(alpha):
            mean.data.add_(alpha)
            var.data.mul_(1 + alpha)
    how = {"clip_frames": 4, "frame_stride": 4, "target_fps": None, "test_crop_size": 32, "sampling": "slowfast"}
    state = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    torch.save({**state, "VideoData": {"labels": LABELS, "preprocessing": how}}, path)
    return path


@pytest.mark.parametrize("network", [None, "own_examples.Tiny"])
def test_a_checkpoint_is_deployed_at_each_alpha_with_its_statistics(network, tmp_path, caplog):
    own = {}
    if network is not None:
        from octvideo import build_network

        own = {"network": build_network(network, num_classes=4)}
    module = recognizer(**own)
    path = written(module, tmp_path / "x.ckpt")
    module.eval()
    clips = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        wanted = {}
        for alpha in ALPHAS:
            with module.elastic.at(alpha):
                wanted[alpha] = module.network(clips)
        assert torch.equal(load_trained(path).network(clips), wanted[0.25])
        deployed = copy.deepcopy(load_trained(path, 0.5).network)
        assert torch.equal(deployed(clips), wanted[0.5])
        for alpha in (0.0, 0.25, 0.5):
            torch.testing.assert_close(set_alpha(deployed, alpha)(clips), wanted[alpha])
        assert not caplog.records
        nearest = load_trained(path, 0.3).network
        assert equal(statistics(nearest), statistics(load_trained(path, 0.25).network))
    assert "no batch-norm statistics of alpha 0.3: those of 0.25 are taken" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elastic": {"alphas": [0.25, 1.5]}}, r"must be two or more different numbers in \[0, 1\], got \[0.25, 1.5\]"),
        ({"elastic": {"alphas": [0.25]}}, "two or more"),
        ({"elastic": {"alphas": [0.25, 0.25]}}, "two or more different"),
        ({"elastic": {"drawn": 3}}, r"model.elastic.drawn must lie in \[1, 2\]"),
        ({"elastic": {"teacher_weight": 2}}, r"teacher_weight in \[0, 1\]"),
        ({"elastic": {"temperature": 0}}, "a positive temperature, got 0.5 and 0"),
        ({"elastic": {"alpha": [0, 1]}}, "model.elastic: .*'alpha'"),
        ({"alpha": 0.1}, r"model.alpha must be one of model.elastic.alphas \[0.0, 0.25, 0.5\], got 0.1"),
        ({"alpha": [0.25, 0.25, 0.25, 0.25]}, "model.alpha must be one of"),
        ({"recompute": True}, "leave out model.recompute and model.compile"),
        ({"compile": "blocks"}, "leave out model.recompute and model.compile"),
        ({"network": Tiny(num_classes=4), "elastic": {"per_stage": True}}, "per_stage is for the zoo's networks"),
        ({"network": STEM, "alpha": 0.0}, "model.elastic.alphas 0.25: Sequential has no convolution that could become"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        recognizer(**options)


def options_of(data, run, processes=1):
    """Two epochs of four batches, with averaged weights, precise batch norm and dropout."""
    return [
        *small(data, run),
        f"--data.batch_size={8 // processes}",
        "--model.name=c2d_r50",
        "--model.elastic.alphas=[0,.25,.5]",
        "--model.downsample=pool",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
        "--ema_decay=0.9",
        "--precise_bn=1",
        "--save_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
    ]


def run_to_the_end(data, folder, processes, kill_at=None):
    """Trains, killed once and resumed if a batch is given; returns all tensors and numbers of the last checkpoint."""
    options = [*options_of(data, folder, processes), "--ckpt_path=auto"]
    if kill_at is not None:
        ended = run_processes(processes, "train_net.py", *options, *fault(kill_at, signal.SIGKILL, rank=processes - 1))
        assert ended[-1].returncode == -signal.SIGKILL, ended[-1].stderr
    ended = run_processes(processes, "train_net.py", *options)
    assert ended[0].returncode == 0, ended[0].stderr
    found = torch.load(folder / "checkpoints" / "step_00000008.ckpt", weights_only=True)
    return tensors({part: found[part] for part in ("state_dict", "current_model_state", "optimizer_states", "loops")})


def assert_same(some, others):
    assert some.keys() == others.keys()
    for name, value in some.items():
        assert torch.equal(value, others[name]) if isinstance(value, torch.Tensor) else value == others[name], name


@pytest.fixture(scope="module")
def whole(motions, tmp_path_factory):
    """The folder of a run, and what its last checkpoint holds."""
    folder = tmp_path_factory.mktemp("elastic") / "whole"
    return folder, run_to_the_end(motions, folder, 1)


def test_a_killed_run_ends_with_the_same_weights(motions, whole, tmp_path):
    assert_same(run_to_the_end(motions, tmp_path / "torn", 1, kill_at=5), whole[1])


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_of_two_processes_ends_with_the_same_weights(motions, tmp_path):
    uninterrupted = run_to_the_end(motions, tmp_path / "whole", 2)
    assert_same(run_to_the_end(motions, tmp_path / "torn", 2, kill_at=5), uninterrupted)


def test_a_run_logs_every_alpha_and_is_tested_at_all_from_one_decoding(motions, whole, tmp_path):
    whole, _ = whole
    with next(whole.glob("csv/**/metrics.csv")).open() as file:
        assert {"val/top1", "val/top1_alpha_0", "val/top1_alpha_0.5", "train/loss_of_others_epoch"} <= set(
            next(csv.reader(file))
        )
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    means = state["elastic.statistics.means"]
    assert not torch.equal(means[0], means[1])

    ckpt = whole / "checkpoints" / "step_00000008.ckpt"
    options = [*small(motions, whole), f"--ckpt={ckpt}", f"--output={tmp_path}", "--data.test_clips=1"]
    finished = run_tool("test_net.py", *options, "--alphas=0,.25,.5")
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "alphas.json").read_text())
    assert [(row["alpha"], row["statistics"]) for row in rows] == [(alpha, "checkpoint") for alpha in ALPHAS]
    assert rows[0]["gmacs"] > rows[1]["gmacs"] > rows[2]["gmacs"]
    predictor = {alpha: prediction.Predictor(load_trained(ckpt, alpha), num_clips=1, num_crops=3) for alpha in ALPHAS}
    for alpha in ALPHAS:
        found = json.loads((tmp_path / f"alpha_{alpha:g}" / "predictions.json").read_text())
        assert len(found["videos"]) == 16
        video = found["videos"][3]
        expected = predictor[alpha].scores(predictor[alpha].views(str(motions / video["path"]))[1]).mean(0)
        torch.testing.assert_close(torch.tensor(video["scores"]), expected, rtol=1e-4, atol=1e-5)


def test_draws_of_stages_need_precise_batch_norm(motions, tmp_path):
    options = [*small(motions, tmp_path), "--model.elastic.alphas=[0,.25]", "--model.elastic.per_stage=true"]
    finished = run_tool("train_net.py", *options)
    assert finished.returncode == 2
    assert "model.elastic.per_stage needs precise_bn" in finished.stderr


def budget(seconds_by_alpha, milliseconds):
    """A budget for a network of these alphas, and of these expected times."""
    network = create_model("c2d_r50", alpha=0.25, width=8, num_classes=4, channels_last=True)
    options = {"alpha": 0.25, "elastic": {"alphas": list(seconds_by_alpha)}}
    made = Budget(Trained(network, options, LABELS, Preprocessing()), milliseconds)
    made.expected = dict(seconds_by_alpha)
    made._set(made._best(made.seconds))
    return made


def test_a_budget_follows_the_load(caplog):
    one = budget({0.0: 0.030, 0.25: 0.020, 0.5: 0.010}, 40)
    assert one.alpha == 0.0

    def run(steps, load):
        chosen = []
        for _ in range(steps):
            chosen.append(one.alpha)
            one.spent(load * one.expected[one.alpha])
        return chosen

    assert run(50, 1.2) == [0.0] * 50
    assert run(20, 1.6) == [0.0] * 3 + [0.25] * 17  # 48 ms: 32 ms are expected at .25
    assert run(20, 3.0)[3:] == [0.5] * 17  # 60 ms
    assert not one._told
    assert alphas_of(one._network) == {0, 0.5}
    run(20, 5.0)
    assert one.alpha == 0.5  # and says once that it is not enough
    assert caplog.text.count("alpha 0.5, the fastest, takes") == 1
    back = run(60, 1.0)
    assert back[-1] == 0.0
    assert sum("becomes" in record.getMessage() for record in caplog.records) == 2 + len(
        [*filter(None, map(float.__sub__, back[1:], back))]
    )


def test_a_budget_does_not_flap():
    one = budget({0.0: 0.030, 0.5: 0.010}, 32)
    switches = 0
    for _ in range(1000):  # alpha 0 is expected to take 27 ms of 32, and takes 36
        before = one.alpha
        one.spent(0.009 if before else 0.036)
        switches += one.alpha != before
    assert 2 <= switches <= 2 * (1000 // PATIENCE[1] + 6)


def test_headroom_keeps_a_network_that_would_just_fit():
    one = budget({0.0: 0.030, 0.5: 0.010}, 29)
    assert one.alpha == 0.5
    for _ in range(100):
        one.spent(0.010 * (HEADROOM + 0.05) * 29 / 30)
    assert one.alpha == 0.5


def test_a_budget_on_a_stream_switches_under_load_and_back(tmp_path, numbered_video, monkeypatch, caplog):
    """Scoring takes 12 ms at alpha 0 and 4 at .5, three times as long under load; the budget is 20 ms."""
    path, calls, clock = written(recognizer(), tmp_path / "x.ckpt"), [], [0.0]

    def score(logits, clips, task):
        alpha = max(alphas_of(logits.__self__.trained.network))
        calls.append(alpha)
        clock[0] += {0: 0.012, 0.25: 0.008, 0.5: 0.004}[alpha] * (3 if len(calls) in range(18, 28) else 1)
        return torch.full((len(clips), 4), 0.25)

    monkeypatch.setattr(prediction, "score_clips", score)
    for module in (prediction, budget_module):
        monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    words = [str(numbered_video), "--stream", f"--ckpt={path}", f"--json={tmp_path / 'steps.jsonl'}"]
    assert stream.main([*words, "--every=.001", "--budget=20", "--seconds=1.9"]) == 0
    used = [json.loads(line)["alpha"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    # After 12 calls to time the alphas and one before the stream begins.
    assert used[:20] == [0.0] * 7 + [0.5] * 10 + [0.0] * 3
    said = [record.getMessage() for record in caplog.records]
    starts, *switches = [line for line in said if line.startswith("budget")]  # other libraries log too
    assert "alpha 0 takes 12.0 ms, 0.25 takes 8.0 ms, 0.5 takes 4.0 ms; it starts at 0" in starts
    assert ["at alpha 0, which becomes 0.5" in switches[0], "which becomes 0:" in switches[1]] == [True, True]


def test_a_budget_without_elastic_training_warns(caplog):
    network = create_model("c2d_r50", alpha=0.25, width=8, num_classes=4, channels_last=True)
    one = Budget(Trained(network, {"alpha": 0.25}, LABELS, Preprocessing()), 10)
    assert one.alphas == [0.25, 0.5, 0.75]
    assert "trained at alpha 0.25 alone" in caplog.text
    with pytest.raises(UserError, match="one alpha in all stages"):
        Budget(Trained(network, {"alpha": [0, 0, 0, 0]}, LABELS, Preprocessing()), 10)
    with pytest.raises(UserError, match="positive number of milliseconds"):
        Budget(Trained(network, {"alpha": 0.25}, LABELS, Preprocessing()), 0)
