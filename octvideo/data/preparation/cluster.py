"""Who works: threads with a watched process each on this machine, or the workers of a cluster of dask.distributed."""

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, Protocol

from octvideo.data.preparation.journal import Facts
from octvideo.data.watchdog import HungError, Watchdog
from octvideo.errors import PreparationError, StoreError, UserError

Function = Callable[[Any], Facts]
CONNECT_SECONDS = 30.0
COUNTING_SECONDS = 5.0  # between two looks at how many workers there are
TASKS_A_WORKER = 4  # that wait at the scheduler or the worker, so that none is idle
_thread = threading.local()


class Workers(Protocol):
    """Calls a function with the arguments of keys, many at once; gives what it finds, as it is found."""

    def __call__(self, function: Function, arguments: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Facts]]:
        """Each key with the facts; those of a call that failed say why, and who is to blame."""


def _attempt(watchdog: Watchdog[Any, Facts], argument: Any) -> Facts:
    why: Facts = {"failed": True}
    try:
        return watchdog(argument)
    except HungError as error:
        reason = str(error)
        if "SIGKILL" not in reason:  # from outside, perhaps for memory
            why = {"timeout": watchdog.timeout_seconds}
    except StoreError as error:
        reason, why["lost"] = str(error), True
    except Exception as error:  # one file's trouble, which the report names
        reason = getattr(error, "strerror", None) or f"unexpected {type(error).__name__}: {error}"
    return {"status": "bad", "reason": reason, **why}


def threads(
    workers: int, timeout_seconds: float, function: Function, arguments: Sequence[tuple[str, Any]]
) -> Iterator[tuple[str, Facts]]:
    """Works on this machine, in processes that are killed if they hang."""

    def start() -> None:
        _thread.watchdog = Watchdog(function, timeout_seconds)

    def call(item: tuple[str, Any]) -> tuple[str, Facts]:
        return item[0], _attempt(_thread.watchdog, item[1])

    with ThreadPool(max(1, min(workers, len(arguments))), start) as pool:
        yield from pool.imap_unordered(call, arguments)


def _watched(name: str, work: Any, timeout_seconds: float, argument: Any) -> Facts:
    """A task of a worker: a method of some work is called in a process that stays for the thread's next tasks."""
    key = (name, work, timeout_seconds)
    if getattr(_thread, "key", None) != key:
        _thread.key, _thread.watchdog = key, Watchdog(getattr(work, name), timeout_seconds)
    return _attempt(_thread.watchdog, argument)


def tasks(
    client: Any, timeout_seconds: float, function: Any, arguments: Sequence[tuple[str, Any]]
) -> Iterator[tuple[str, Facts]]:
    """Works on a cluster: a task is one call, which another worker repeats where one dies with it."""
    from distributed import as_completed

    todo, keys = iter(arguments), dict[Any, str]()
    running = as_completed(loop=client.loop)

    wanted, counted = 0, -math.inf

    def submit() -> None:
        nonlocal wanted, counted
        if time.monotonic() > counted + COUNTING_SECONDS:
            wanted, counted = TASKS_A_WORKER * max(4, sum(client.nthreads().values())), time.monotonic()
        for _, (key, argument) in zip(range(wanted - len(keys)), todo, strict=False):
            task = client.submit(_watched, function.__name__, function.__self__, timeout_seconds, argument, pure=False)
            keys[task] = key
            running.add(task)

    try:
        submit()
        for task in running:
            key = keys.pop(task)
            submit()
            if task.status == "finished":
                yield key, task.result()
            elif task.status == "error":
                yield key, {"status": "bad", "reason": _one_line(task.exception()), "failed": True}
            elif task.status == "cancelled":
                raise ConnectionError
            else:  # its result was lost with a worker, and is being found again
                keys[task] = key
                running.add(task)
    except OSError as error:
        raise PreparationError("the cluster's scheduler is gone: the same command continues") from error


def _one_line(error: BaseException) -> str:
    if type(error).__name__ == "KilledWorker":
        return "every worker that took it up died"
    return " ".join(f"unexpected {type(error).__name__}: {error}".split())


@contextlib.contextmanager
def workers_of(scheduler: str | None, workers: int, timeout_seconds: float) -> Iterator[Workers]:
    """The threads of this machine, or a cluster: tcp://HOST:PORT, local[:WORKERS] or slurm[:JOBS]; see dask's docs."""
    if scheduler is None:
        yield functools.partial(threads, workers, timeout_seconds)
        return
    try:
        import distributed
    except ImportError as error:
        raise UserError("--scheduler needs distributed: pip install 'octvideo[cluster]'") from error
    kind, _, count = scheduler.partition(":")
    if "://" not in scheduler and (kind not in ("local", "slurm") or (count and not count.isdecimal())):
        raise UserError(f"--scheduler must be tcp://HOST:PORT, local[:WORKERS] or slurm[:JOBS], got {scheduler!r}")
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if kind == "local":
            local = {"n_workers": int(count or os.cpu_count() or 1), "threads_per_worker": 1}
            quiet: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "silence_logs": 50}
            address = stack.enter_context(distributed.LocalCluster(**local, **quiet))
        elif kind == "slurm":
            try:
                from dask_jobqueue import SLURMCluster
            except ImportError as error:
                raise UserError("--scheduler slurm needs dask-jobqueue: pip install dask-jobqueue") from error
            address = stack.enter_context(SLURMCluster())  # with the options of ~/.config/dask/jobqueue.yaml
            address.scale(jobs=int(count or 1))
        try:
            client = stack.enter_context(distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except (OSError, ValueError) as error:
            raise UserError(f"--scheduler {scheduler} cannot be reached: {error}") from error
        yield functools.partial(tasks, client, timeout_seconds)
