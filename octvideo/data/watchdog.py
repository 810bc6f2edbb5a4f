"""A process of its own for decoding, which can be killed where native code hangs or crashes."""

import contextlib
import ctypes
import io
import itertools
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any, Generic, TypeVar

import torch

from octvideo import stores

START_SECONDS = 60.0  # for a process to take up a call; on a busy machine this may last longer than the call itself
KILL_SECONDS = 5.0  # until a killed process is given up
_BEAT, _ANSWER = b"beat", b"answer"
Argument = TypeVar("Argument")
Result = TypeVar("Result")
_parent: Connection | None = None  # in a watched process: where its signs of life go
_next_beat = 0.0
_starting = threading.Lock()  # a process must not inherit the other end of a pipe that another thread makes


class HungError(RuntimeError):
    """A watched call took too long, or its process died; the reason says which, in one line."""

    @property
    def reason(self) -> str:
        return str(self)


def still_alive() -> None:
    """Restarts the clock of a watched call that does long work; does nothing elsewhere."""
    global _next_beat
    if _parent is not None and time.monotonic() >= _next_beat:
        _parent.send_bytes(_BEAT)
        _next_beat = time.monotonic() + 0.5


def _forget_scalers() -> None:
    """Frees the scaler that PyAV 19 keeps for each thread: a fork would free it too, and wait for threads it lacks."""
    frames: Any = sys.modules.get("av.video.frame")
    if hasattr(frames, "_thread_local"):
        frames._thread_local = threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forget_scalers)


class Watchdog(Generic[Argument, Result]):
    """Calls a function in another process, and kills that process where a call takes too long.

    A decoder that hangs in native code holds the interpreter, so no signal handler or thread can end it. The process, a
    fork of the one that calls first, stays for the next call. It has no other threads: the function must not use locks
    that they may hold, nor a library that has started threads in the parent, as decord does when first used.

    A call may take timeout_seconds, or go on so long without `still_alive()`, from when the process takes it up. With
    None, or where the platform cannot fork, the function is called directly, unwatched.
    """

    def __init__(self, function: Callable[[Argument], Result], timeout_seconds: float | None) -> None:
        self.function = function
        self.timeout_seconds = timeout_seconds
        self._owner = 0  # the process that started the watched one; its forks must not talk with it

    def __reduce__(self) -> tuple[type, tuple[Callable[[Argument], Result], float | None]]:
        return type(self), (self.function, self.timeout_seconds)

    def __call__(self, argument: Argument) -> Result:
        """The function's result or error; HungError if there is no sign of life in time, or the process died."""
        if self.timeout_seconds is None or not hasattr(os, "fork"):
            return self.function(argument)
        if self._owner != os.getpid():
            self._start()
        try:
            try:
                self._connection.send(argument)
            except ConnectionError:  # it died after the last call, which is no fault of this one
                self._end()
                self._start()
                self._connection.send(argument)
            limit = max(START_SECONDS, self.timeout_seconds)
            while self._connection.poll(limit):
                if self._connection.recv_bytes() == _ANSWER:
                    break
                limit = self.timeout_seconds
            else:
                raise HungError(f"no result within {limit:g} s: the decoder was killed")
            with open(self._memory.fileno(), "rb", closefd=False) as memory:  # it has buffered no earlier result
                memory.seek(0)
                answer: tuple[Result, Exception | None] = pickle.load(memory)
        except (EOFError, ConnectionError) as lost:
            raise HungError(f"the decoder's process died ({self._end()})") from lost
        except BaseException:  # hung, or interrupted in the middle of a message
            self.close()
            raise
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def _start(self) -> None:
        parent = os.getpid()
        memfd = getattr(os, "memfd_create", None)  # not in /dev/shm, which containers keep small
        self._memory: IO[bytes] = os.fdopen(memfd("octvideo"), "w+b") if memfd else tempfile.TemporaryFile()  # noqa: SIM115
        with _starting:
            self._connection, there = Pipe()
            self._pid = os.fork()
            if self._pid == 0:
                self._connection.close()
                try:
                    _serve(self.function, there, self._memory, parent)
                finally:
                    os._exit(1)
            there.close()
        self._owner = parent

    def _end(self) -> str:
        """Kills and reaps the process; returns how it ended."""
        self._owner = 0
        self._connection.close()
        self._memory.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        for _ in range(int(KILL_SECONDS / 0.002)):
            try:
                found, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                return "its exit status is lost"
            if found:
                code = os.waitstatus_to_exitcode(status)
                return signal.Signals(-code).name if code < 0 else f"exit status {code}"
            time.sleep(0.002)
        return "it cannot be killed"  # it waits for a device that does not answer

    def close(self) -> None:
        """Ends the process; the next call starts another one."""
        if self._owner == os.getpid():
            self._end()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()


def _serve(function: Callable[[Any], Any], connection: Connection, memory: IO[bytes], parent: int) -> None:
    """The watched process: answers calls until its parent closes the pipe or dies."""
    global _parent, _starting
    _starting = threading.Lock()  # the parent's may be held
    torch.set_num_threads(1)  # the parent's threads are not here, and PyTorch would wait for them
    library = ctypes.CDLL(None)
    if sys.platform == "linux":  # a call that hangs would never see the pipe closed
        library.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the signal that it gets when its parent dies
    if os.getppid() != parent:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group, they are for the training process to handle
    _parent, stores.on_wait = connection, still_alive
    for call in itertools.count(1):
        try:
            argument = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send_bytes(_BEAT)  # starts the clock
        memory.seek(0)
        try:
            pickle.dump((function(argument), None), memory, protocol=5)
        except Exception as error:  # it is raised again in the parent
            memory.seek(0)  # the result may have been written in part
            _ErrorPickler(memory, 5).dump((None, _portable(error)))
        memory.flush()
        connection.send_bytes(_ANSWER)
        if call % 20 == 0 and hasattr(library, "malloc_trim"):
            library.malloc_trim(0)  # else glibc keeps what is free between used pieces, some 40 MB after 20,000 clips


class _ErrorPickler(pickle.Pickler):
    """Pickles errors alone: in a worker of dask, tblib adds causes and tracebacks, with which many cannot travel."""

    dispatch_table: dict[type, Any] = {}  # noqa: RUF012  (in place of copyreg's)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, which survives the way to another process."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(trace)
    with contextlib.suppress(Exception):  # whatever its class makes of a pickle
        _ErrorPickler(pickled := io.BytesIO(), 5).dump(error)
        if isinstance(pickle.loads(pickled.getvalue()), Exception):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}\n{trace}")


def outlive_signals(worker: int) -> None:
    """Lets a loader's worker work on when its whole group gets SIGTERM or SIGUSR1, as from Slurm and torchrun.

    The training process needs it to finish its step, save and leave, and ends it as usual by a SIGTERM of its own.
    """

    def end_for(parent: int) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux: it tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_for, args=(os.getppid(),), daemon=True).start()
