"""Learning rates of the recipes, by hand, whatever the number of devices."""

import math

import pytest

from octvideo.training.schedule import Schedule

SCRATCH = Schedule(0.1, 196, 0.01, 34)
IMAGENET = Schedule(0.01, 82, milestones=(41, 205 / 3))  # of 300k iterations, at 150k and 250k
COSINE_AT_34 = 0.1 * 0.5 * (1 + math.cos(math.pi * 34 / 196))


def test_the_scratch_recipe_at_twenty_points():
    root = math.sqrt(0.5)
    warming = {
        epoch: 0.01 + (COSINE_AT_34 - 0.01) * epoch / 34 for epoch in (0, 1, 2, 3.4, 6.8, 8.5, 17, 20.4, 25.5, 33, 34)
    }
    cosine = {
        49: 0.05 * (1 + root),  # a quarter
        196 / 3: 0.05 * 1.5,
        98: 0.05,
        392 / 3: 0.05 * 0.5,
        147: 0.05 * (1 - root),
        196 * 5 / 6: 0.05 * (1 - math.sqrt(0.75)),
        196 * 3 / 5: 0.05 * (1 - (math.sqrt(5) - 1) / 4),
        196 * 4 / 5: 0.05 * (1 - (math.sqrt(5) + 1) / 4),
        196: 0,
    }
    table = warming | cosine
    assert len(table) == 20
    for epoch, rate in table.items():
        assert SCRATCH.at(epoch) == pytest.approx(rate, abs=1e-12), epoch


def test_the_imagenet_recipe_at_twenty_points():
    table = dict.fromkeys((0, 1, 10, 20.5, 30, 40, 40.99), 0.01)
    table |= dict.fromkeys((41, 41.01, 45, 50, 60, 68, 68.33), 0.001)
    table |= dict.fromkeys((68.34, 70, 75, 80, 81, 82), 0.0001)
    assert len(table) == 20
    for epoch, rate in table.items():
        assert IMAGENET.at(epoch) == pytest.approx(rate, rel=1e-12), epoch


def test_without_warm_up_the_cosine_starts_at_its_peak():
    assert Schedule(0.1, 100).at(0) == pytest.approx(0.1)


def test_steps_can_be_warmed_up_too():
    schedule = Schedule(0.4, 30, 0.1, 3, (10, 20), 0.5)
    assert [schedule.at(epoch) for epoch in (0, 1.5, 3, 9.9, 10, 20)] == pytest.approx([0.1, 0.25, 0.4, 0.4, 0.2, 0.1])


def test_a_schedule_scales_with_the_batch_at_every_point():
    doubled = SCRATCH.scaled(2)
    assert all(doubled.at(epoch) == pytest.approx(2 * SCRATCH.at(epoch)) for epoch in (0, 17, 34, 98, 150))


def test_a_run_of_another_length_has_the_warm_up_or_a_fifth_of_itself():
    assert SCRATCH.over(40) == Schedule(0.1, 40, 0.01, 34)
    assert SCRATCH.over(34) == Schedule(0.1, 34, 0.01, 6.8)


def test_a_schedule_says_what_it_is():
    assert str(SCRATCH) == "half a cosine from 0.1 to 0 over 196 epochs, warm-up from 0.01 in 34 epochs"
    assert str(IMAGENET) == "0.01, times 0.1 at epoch 41, 68.3333 of 82"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak": 0}, "learning_rate must be positive.*got 0, 0.0"),
        ({"warmup_start": -1}, "warmup_start and warmup_epochs at least 0.*got 0.1, -1"),
        ({"warmup_epochs": -1}, "warmup_start and warmup_epochs at least 0"),
        ({"epochs": 0}, "longer than 0 epochs"),
        ({"milestones": (0, 3)}, r"epochs above 0 in ascending order, got \[0, 3\]"),
        ({"milestones": (5, 3)}, "in ascending order"),
        ({"decay": 1}, "decay must lie between 0 and 1, got 1"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"peak": 0.1, "epochs": 10, **options})
