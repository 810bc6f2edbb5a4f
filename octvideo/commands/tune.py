"""Searches options of a training for the best validation accuracy, with Optuna.

octvideo tune --cfg quickstart --output runs/tune --trials 30
              --search model.learning_rate=log:.005..0.5 model.alpha=0,.125,.25 data.batch_size=int:8..32
              [--pruner hyperband] [OPTION OF octvideo train ...]

--search takes what varies, OPTION=VALUES each, of any options of octvideo train:
  LOW..HIGH      numbers between the two
  log:LOW..HIGH  likewise, evenly distributed over orders of magnitude
  int:LOW..HIGH  whole numbers, both ends included
  A,B,...        one of these; an option that takes a list: [0,0,.5,.5],[0,0,0,0]
or a YAML file of OPTION: VALUES, where A,B,... may be a list. Options that this command does not know are those of
every training. The sampler learns from ended trials which values are worth a try.

Each trial is an `octvideo train` in OUTPUT/trial_0007, say, with all its output in log.txt. Its result is the best
--metric of its epochs. A trial that is behind the others after as many epochs is pruned: it saves, and stops. A trial
whose training fails counts as failed and is named; where the first three fail for the same reason, the study ends.

Several processes, on several nodes too, share the study that has the same OUTPUT, which all must see; --trials counts
those of all. A process ends when all trials have. Stopped or killed at any moment, the same command resumes: trials
that a killed process left go on from their last checkpoint.

OUTPUT/study.db    the study, for Optuna (storage sqlite:///OUTPUT/study.db, study octvideo)
OUTPUT/trials.csv  number, state, value, epochs, options and reason of failure of each trial
OUTPUT/tune.png    the results by trial and by option

Exit status: 0 if there is a result; 1 if no trial has one; 2 for a mistake in the command, in options or files; 75 if
a training was stopped by a signal; 130 on Ctrl-C, 143 on SIGTERM, when the training under way has been saved.
"""

import contextlib
import csv
import json
import math
import os
import random
import shlex
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import yaml
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from octvideo.commands import children
from octvideo.commands.children import RunFailedError
from octvideo.commands.options import Parser, fail, number
from octvideo.errors import UserError
from octvideo.files import appearing, lock

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
        distribution_to_json,
    )
    from optuna.exceptions import StorageInternalError
    from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
    from optuna.samplers import RandomSampler, TPESampler
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError  # of Optuna's storage
except ModuleNotFoundError:
    fail("tuning needs Optuna: pip install 'octvideo[tune]'")

OWN = {"--trainer.default_root_dir", "--ckpt_path", "--cfg", "--print_config"}
ALIKE = 3  # trials that fail for one reason, after which the others would too
LISTED = 20  # trials in the table that is printed
Search = dict[str, BaseDistribution]


def read_values(text: str) -> BaseDistribution:
    """The values of one option of --search; ArgumentTypeError."""
    kind, _, span = text.rpartition(":") if text.startswith(("log:", "int:")) else ("", "", text)
    low, dots, high = span.partition("..")
    try:
        if kind == "int" and dots:
            return IntDistribution(int(low), int(high))
        if dots and all(math.isfinite(float(end)) for end in (low, high)):
            return FloatDistribution(float(low), float(high), log=kind == "log")
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no range of numbers: {error}") from None
    try:
        return one_of(yaml.safe_load(f"[{text}]") if not kind and not dots else [], text)
    except yaml.YAMLError:
        return one_of([], text)


def one_of(choices: list[object], given: object) -> BaseDistribution:
    """A choice between the texts that stand for values on a command line."""
    texts = dict.fromkeys(value if isinstance(value, str) else json.dumps(value) for value in choices)
    if len(texts) < 2:
        raise ArgumentTypeError(f"must be LOW..HIGH, log:LOW..HIGH, int:LOW..HIGH or A,B,..., got {str(given)!r}")
    return CategoricalDistribution([*texts])


def read_search(text: str) -> Search:
    """The type of each of --search."""
    name, equals, values = text.partition("=")
    if equals:
        return {name: read_values(values)}
    try:
        named = yaml.safe_load(Path(text).read_text())
        return {str(key): one_of(v, v) if isinstance(v, list) else read_values(str(v)) for key, v in named.items()}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ArgumentTypeError(f"{text!r} is neither OPTION=VALUES nor a YAML file of them: {error}") from None


def read_arguments(words: list[str]) -> Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    children.add_recipe(parser)
    what = "what varies, or a YAML file of it"
    add("--search", type=read_search, nargs="+", action="extend", required=True, metavar="OPTION=VALUES", help=what)
    add("--trials", type=number, default=20, metavar="N", help="of the whole study; default: %(default)s")
    add("--metric", default="val/top1", metavar="NAME", help="a column of metrics.csv; default: %(default)s")
    add("--direction", choices=("maximize", "minimize"), default="maximize", help="default: %(default)s")
    what = "how values are chosen; tpe: at random in the first 10 trials; default: %(default)s"
    add("--sampler", choices=("tpe", "random"), default="tpe", help=what)
    what = "median: ends trials below the median of 5 or more others; default: %(default)s"
    add("--pruner", choices=("median", "hyperband", "none"), default="median", help=what)
    add("--seed", type=int, default=0, metavar="N", help="of the sampler; default: %(default)s")
    add("--storage", metavar="URL", help="database of the study, in place of study.db, as SQLAlchemy names it")
    arguments = children.read_recipe(parser, words, OWN, "a study sets {} itself: give --output")
    pairs = [pair for search in arguments.search for pair in search.items()]
    arguments.search = dict(pairs)
    if len(arguments.search) < len(pairs):
        fail("--search has an option twice")
    for name in arguments.search:
        if f"--{name}" in OWN | {other.split("=")[0] for other in arguments.others}:
            fail(f"--search {name}: it is given, or set by the study itself")
    return arguments


def check(arguments: Namespace) -> None:
    """Ends the program for options that training refuses, and where there would be nothing to read the metric from."""
    first = {
        name: values.choices[0] if isinstance(values, CategoricalDistribution) else values.low
        for name, values in arguments.search.items()
    }
    config = children.resolve("train", [*arguments.recipe, *words_of(first)])
    if "csv" not in config["loggers"] or config["trainer"]["logger"] not in (None, True):
        fail("--metric is read from metrics.csv: let loggers have csv, and trainer.logger be true")


def words_of(values: dict[str, object]) -> list[str]:
    """Options as a command line has them."""
    return [f"--{name}={value}" for name, value in values.items()]


def open_study(arguments: Namespace) -> optuna.Study:
    """The study of the folder, begun if need be; ends the program if it is one of other options."""
    url = arguments.storage or f"sqlite:///{arguments.output / 'study.db'}"
    wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    search = {name: distribution_to_json(values) for name, values in arguments.search.items()}
    what = children.contents(arguments) | {"search": search, "goal": [arguments.direction, arguments.metric]}
    pruners: dict[str, BasePruner] = {"median": MedianPruner(), "hyperband": HyperbandPruner(), "none": NopPruner()}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with alone(arguments.output):
        children.keep(arguments.output / "study.json", what, "a study of other options")
        return optuna.create_study(
            storage=optuna.storages.RDBStorage(url, engine_kwargs=wait),
            study_name=str(arguments.output.resolve()) if arguments.storage else "octvideo",
            direction=arguments.direction,
            pruner=pruners[arguments.pruner],
            load_if_exists=True,
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is in a block like this one of the same folder."""
    while (held := lock(folder / ".lock")) is None:
        time.sleep(0.05)
    with held:
        yield


def folder_of(trial: int, arguments: Namespace) -> Path:
    """Where a trial trains."""
    return Path(arguments.output, f"trial_{trial:04}")


def take(study: optuna.Study, arguments: Namespace) -> tuple[optuna.Trial, BinaryIO] | None:
    """A trial that a killed process left, or a new one, and its lock; None if others run, or have ended, all there are.

    What is drawn for a trial depends on the seed, its number and the trials that have ended, not on who draws it.
    """

    def claimed(number: int) -> BinaryIO | None:
        folder_of(number, arguments).mkdir(exist_ok=True)
        seed = random.Random(f"{arguments.seed} {number}").getrandbits(32)
        study.sampler = TPESampler(seed=seed) if arguments.sampler == "tpe" else RandomSampler(seed=seed)
        return lock(folder_of(number, arguments) / ".lock")

    with alone(arguments.output):
        trials = study.get_trials(deepcopy=False)
        for left in [trial for trial in trials if trial.state == TrialState.RUNNING]:
            if held := claimed(left.number):
                return optuna.Trial(study, left._trial_id), held  # Optuna has no public name for it
        if len(trials) >= arguments.trials:
            return None
        held = claimed(len(trials))
        assert held is not None, "only this process begins a trial now"
        return study.ask(), held


def draw_values(trial: optuna.Trial, search: Search) -> dict[str, object]:
    """The trial's values, drawn if it has none yet."""
    found: dict[str, object] = {}
    for name, values in search.items():
        if isinstance(values, CategoricalDistribution):
            found[name] = trial.suggest_categorical(name, values.choices)
        elif isinstance(values, IntDistribution):
            found[name] = trial.suggest_int(name, values.low, values.high)
        elif isinstance(values, FloatDistribution):
            found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return found


def read_metric(folder: Path, metric: str) -> dict[int, float]:
    """The finite values of a metric that a run has logged, by epoch; a later one of an epoch counts."""
    found = {}
    tables = folder.glob("csv/version_*/metrics.csv")  # one for each time that it was resumed
    for path in sorted(tables, key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get(metric) and row.get("epoch") and math.isfinite(value := float(row[metric])):
                    found[int(row["epoch"])] = value
    return found


def train(study: optuna.Study, trial: optuna.Trial, arguments: Namespace, progress: children.RunProgress) -> str:
    """Trains a trial from where it is, and tells the study its result, which is returned as a phrase."""
    folder, name = folder_of(trial.number, arguments), folder_of(trial.number, arguments).name
    values = words_of(draw_values(trial, arguments.search))
    children.keep(folder / "options.json", {"options": values}, "a run of other options")
    progress.begin(name, " ".join(values))
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def hopeless() -> bool:
        """Whether the pruner gives the trial up, now that it knows the epochs that have ended."""
        for epoch, value in read_metric(folder, arguments.metric).items():
            if epoch not in reported:
                reported.add(epoch)
                trial.report(value, epoch)
                shown = f"{name}, epoch {epoch + 1}: {arguments.metric} {value:.4g}"
                progress.update(progress.runs, description=shown)
                if trial.should_prune():
                    return True
        return False

    def tell(state: TrialState, value: float | None = None) -> None:
        with alone(arguments.output):
            study.tell(trial, value, state=state)

    try:
        options = [*arguments.recipe, *values, f"--trainer.default_root_dir={folder}", "--ckpt_path=auto"]
        if not children.call("train", options, folder / "log.txt", hopeless):
            tell(TrialState.PRUNED)
            return f"{name}: pruned after epoch {len(reported)}"
        hopeless()  # reports the last epochs
        results = read_metric(folder, arguments.metric).values()
        if not results:
            raise RunFailedError(f"there is no {arguments.metric} in its metrics.csv")
    except RunFailedError as error:
        if error.status == os.EX_TEMPFAIL:
            print(f"{name} was stopped by a signal; the same command resumes", file=sys.stderr)
            sys.exit(os.EX_TEMPFAIL)
        reason = str(error).removeprefix("octvideo train: error: ")
        trial.set_user_attr("reason", reason)
        tell(TrialState.FAIL)
        return f"{name}: failed: {reason}"
    best = (max if arguments.direction == "maximize" else min)(results)
    tell(TrialState.COMPLETE, best)
    return f"{name}: {arguments.metric} {best:.4g}"


def run_all(study: optuna.Study, arguments: Namespace) -> None:
    """Runs trials until all have ended, those of other processes too."""
    reasons: list[str | None] = []  # why trials of this process failed
    with children.RunProgress(arguments.trials) as progress:
        while True:
            trials = study.get_trials(deepcopy=False)
            progress.update(progress.runs, completed=sum(trial.state.is_finished() for trial in trials))
            if (taken := take(study, arguments)) is None:
                if all(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
                    return
                progress.update(progress.runs, description="waiting for trials of other processes")
                time.sleep(children.LOOK_SECONDS)
                continue
            trial, held = taken
            with held:
                said = train(study, trial, arguments, progress)
            reasons.append(reason := trial.user_attrs.get("reason"))
            progress.say(said, failed=reason is not None)
            write_trials(study, arguments)
            if reason and reasons == [reason] * ALIKE:
                fail(f"the first {ALIKE} trials failed: {reason}")


def row_of(trial: FrozenTrial, search: Search) -> dict[str, object]:
    """A trial's row in trials.csv."""
    head = {"number": trial.number, "state": trial.state.name.lower(), "value": trial.value}
    options = {name: trial.params.get(name) for name in search}
    return {**head, "epochs": len(trial.intermediate_values), **options, "reason": trial.user_attrs.get("reason")}


def write_trials(study: optuna.Study, arguments: Namespace) -> None:
    """Writes trials.csv."""
    path = arguments.output / "trials.csv"
    with alone(arguments.output), appearing(path) as partial, partial.open("w", newline="") as file:
        rows = [row_of(trial, arguments.search) for trial in study.get_trials(deepcopy=False)]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_results(study: optuna.Study, arguments: Namespace) -> int:
    """Prints the best trials and what matters, draws them, and returns the exit status."""
    write_trials(study, arguments)
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ended.sort(key=lambda trial: trial.value or 0.0, reverse=arguments.direction == "maximize")
    others = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.COMPLETE]
    table = Table("trial", "state", arguments.metric, "epochs", *arguments.search, "reason", box=box.MARKDOWN)
    for trial in (ended + others)[:LISTED]:
        cells = row_of(trial, arguments.search).values()
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x) for x in cells))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if not ended:
        print("no trial has a result", file=sys.stderr)
        return 1
    if len(ended) >= 10 and len(arguments.search) > 1:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        print("importance: " + ", ".join(f"{name} {share:.2f}" for name, share in found.items()))
    with appearing(arguments.output / "tune.png") as partial:
        draw(ended, arguments).savefig(partial, format="png", dpi=120)
    best = ended[0]
    print(f"best: {folder_of(best.number, arguments)}, {arguments.metric} {best.value:.4g}")
    print(shlex.join(["octvideo", "train", *arguments.recipe, *words_of(best.params)]))
    return 0


def draw(ended: list[FrozenTrial], arguments: Namespace) -> Figure:
    """The results of trials that have ended: by trial, and by each option."""
    panels = 1 + len(arguments.search)
    figure = Figure(figsize=(3.4 * panels, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    values = [trial.value for trial in ended]
    axes[0].plot([trial.number for trial in ended], values, "o")
    axes[0].set(xlabel="trial", ylabel=arguments.metric)
    for axis, (name, choices) in zip(axes[1:], arguments.search.items(), strict=True):
        axis.plot([trial.params[name] for trial in ended], values, "o")
        axis.set(xlabel=name, xscale="log" if getattr(choices, "log", False) else axis.get_xscale())
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def tune(words: list[str]) -> int:
    """Does what the command line says; returns the exit status."""
    arguments = read_arguments(words)
    check(arguments)
    try:
        study = open_study(arguments)
        run_all(study, arguments)
        return write_results(study, arguments)
    except (SQLAlchemyError, StorageInternalError) as error:
        raise UserError(f"the study's database cannot be used: {str(error).splitlines()[0]}") from error


def main(words: list[str]) -> int:
    """Runs the command."""
    return children.stoppable(lambda: tune(words))
