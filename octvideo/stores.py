"""Files behind URIs (s3://, gs://, az://, http:// ...), through fsspec: read in parts, written whole, tried again.

A request that fails for the network's sake is repeated with growing waits and counted. What fails for good is one of
three: FileNotFoundError, for what is not there; PermissionError; and StoreError, for a store that cannot be used, be it
that it does not answer, or that there are no credentials.
"""

import asyncio
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.asyn import AsyncFileSystem

from octvideo.errors import StoreError, UserError
from octvideo.files import appearing, lock

log = logging.getLogger(__name__)
STEP = re.compile(r"step_\d+\.ckpt$")
ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")  # how URIs start
PATIENCE_SECONDS = 300.0  # how long a request is repeated before the store counts as lost
START_PATIENCE_SECONDS = 20.0  # of a store that has never answered, so that a wrong address shows soon
TIMEOUT_SECONDS, SLOWEST = 10.0, 2**20  # of a request: for its answer, and in bytes a second from then on
LONGEST_WAIT_SECONDS = 15.0
TRANSIENT = {errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH}
TRANSIENT |= {errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, getattr(errno, "EREMOTEIO", errno.EIO)}
NETWORKING = {"aiohttp", "asyncio", "azure"}  # packages whose errors without a status are the network's
BOTOCORE = {"HTTPClientError", "ConnectionError", "IncompleteReadError"}  # likewise, and their subclasses
GONE = {404, 410, 451}  # status of what is not there, 451 for legal reasons
PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}  # an extra of this package each
# Stores' own repetitions are off, as nobody could count them, and so are listings from memory.
OPTIONS: dict[str, dict[str, Any]] = {scheme: {"use_listings_cache": False} for scheme in PACKAGES}
OPTIONS["s3"] |= {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": TIMEOUT_SECONDS}}
OPTIONS["s3a"] = OPTIONS["s3"]
on_wait: Callable[[], None] = lambda: None  # noqa: E731  (called now and then in long waits; a watched process sets it)


class Traffic(NamedTuple):
    """What was read from stores."""

    store: str = ""  # the last one, such as s3://bucket
    requests: int = 0
    retries: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def plus(self, other: "Traffic") -> "Traffic":
        """The sum."""
        counts = self.requests + other.requests, self.retries + other.retries, self.bytes + other.bytes
        return Traffic(other.store or self.store, *counts, self.seconds + other.seconds)


class Stat(NamedTuple):
    """What tells a file from its earlier versions."""

    bytes: int
    mtime_ns: int  # or another number that versions differ in; 0 where a store tells nothing


HERE = object()
MOST_AHEAD = 4  # requests that nobody has asked for yet
_ahead: "dict[tuple[str, int | None, int | None], Future[bytes]]" = {}
_traffic = Traffic()
_answered: set[str] = set()  # stores; processes that this one starts know them, too


def _count(traffic: Traffic) -> None:
    global _traffic
    _traffic = _traffic.plus(traffic)  # reading is in one thread of a process


def take_traffic() -> Traffic:
    """What this process has read since the last call."""
    global _traffic
    taken, _traffic = _traffic, Traffic()
    return taken


def is_uri(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of something, not a local file."""
    return bool(ADDRESS.match(os.fspath(path)))


def real(path: str) -> str:
    """A path without links; an address as it is."""
    return path if is_uri(path) else os.path.realpath(path)


def store_of(uri: str) -> str:
    """The store in messages: scheme and bucket or host."""
    match = re.match(r"([\w+.-]+://[^/?#]*)", uri.rpartition("::")[2])
    return match[1] if match else uri


def child(folder: str | os.PathLike[str], name: str) -> str:
    """The path or URI of a file in a folder."""
    return os.path.join(os.fspath(folder), name)


def beside(path: str | os.PathLike[str], name: str) -> str:
    """The path or URI of another file in the folder of a file."""
    return child(os.path.dirname(os.fspath(path)), name)


def _file_system(uri: str) -> tuple[Any, str]:
    scheme, *inner = (part.partition("://")[0] for part in uri.split("::"))
    try:
        options: dict[str, Any] = {name: OPTIONS.get(name, {}) for name in inner}
        system, path = fsspec.core.url_to_fs(uri, **OPTIONS.get(scheme, {}), **options)
    except ImportError as error:
        extra = PACKAGES.get(scheme)
        cure = f"pip install 'octvideo[{extra}]'" if extra else str(error)
        raise UserError(f"{uri}: {scheme}:// needs another package: {cure}") from error
    except ValueError as error:
        raise OSError(errno.EPROTONOSUPPORT, f"no kind of store is called {scheme}://", uri) from error
    if hasattr(system, "retries"):
        system.retries = 1
    return system, path


def _request(uri: str, method: str, *arguments: Any, size: int = 0, **named: Any) -> Any:
    """Calls a method of the file system until it works; HERE stands for the path, and `size` bytes are moved."""
    began, attempt = time.monotonic(), 0
    system, path = _file_system(uri)
    while True:
        on_wait()
        start = time.monotonic()
        try:
            given = [path if argument is HERE else argument for argument in arguments]
            if isinstance(system, AsyncFileSystem) and hasattr(system, f"_{method}"):
                limit = (TIMEOUT_SECONDS + size / SLOWEST) * 2 ** min(attempt, 2)
                result = _wait(system, getattr(system, f"_{method}")(*given, **named), limit)
            else:
                result = getattr(system, method)(*given, **named)
            _answered.add(store_of(uri))
            _count(Traffic(store_of(uri), 1, 0, 0, time.monotonic() - start))
            return result
        except (FileNotFoundError, NotADirectoryError) as error:
            if _status(error.__cause__) in (401, 403):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), uri) from error
            if not (isinstance(error.__cause__, Exception) and _is_transient(error.__cause__)):
                _answered.add(store_of(uri))
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
            failure: Exception = error.__cause__  # of web servers fsspec says "not found" whatever it was
        except (PermissionError, IsADirectoryError, UserError):
            _answered.add(store_of(uri))
            raise
        except Exception as error:
            failure = error
        if _status(failure) in GONE:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from failure
        if _status(failure) == 416:  # the range starts behind the end
            return b""
        why = " ".join(str(failure).split()) or type(failure).__name__
        if not _is_transient(failure):
            raise StoreError(f"{uri}: {why}") from failure
        if time.monotonic() - began > (PATIENCE_SECONDS if store_of(uri) in _answered else START_PATIENCE_SECONDS):
            tried = f"{attempt + 1} requests in {time.monotonic() - began:.0f} s failed"
            raise StoreError(f"{store_of(uri)} cannot be used: {tried}, the last with: {why} ({uri})") from failure
        attempt += 1
        _count(Traffic(store_of(uri), 1, 1, 0, time.monotonic() - start))
        # Random, so that the processes of a cluster do not come back all at once.
        wait = min(0.1 * 2**attempt, LONGEST_WAIT_SECONDS) * random.SystemRandom().uniform(0.5, 1)
        while wait > 0:
            on_wait()
            time.sleep(min(wait, 1.0))
            wait -= 1.0


def _wait(system: Any, coroutine: Coroutine[Any, Any, Any], limit: float) -> Any:
    """The result of a request, or TimeoutError; says meanwhile that this process is alive."""
    asked = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, limit), system.loop)
    try:
        while True:
            try:
                return asked.result(0.5)
            except TimeoutError:
                if asked.done():
                    return asked.result()
            on_wait()
    finally:
        asked.cancel()  # at Ctrl-C


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error stands for, by the names that stores give it."""
    response = getattr(error, "response", None)  # of S3
    about = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    found = [about.get("HTTPStatusCode"), *(getattr(error, name, None) for name in ("status", "status_code", "code"))]
    status = next((int(str(one)) for one in found if str(one).isdecimal()), None)
    return _status(error.__cause__) if error is not None and not status else status


def _is_transient(error: Exception) -> bool:
    """Whether another try may help."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 425, 429)
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("botocore")}
    if names & BOTOCORE or isinstance(error, TimeoutError | ConnectionError):
        return True
    return getattr(error, "errno", None) in TRANSIENT or type(error).__module__.partition(".")[0] in NETWORKING


def read(path: str | os.PathLike[str], start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a local or remote file, or those from start to end, fewer where it ends before."""
    if not is_uri(uri := os.fspath(path)):
        with open(uri, "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))
    wanted = None if end is None else end - (start or 0)
    if wanted == 0:
        return b""
    content: bytes | None = None
    if (asked := _ahead.pop((uri, start, end), None)) is not None:
        began = time.monotonic()
        with contextlib.suppress(Exception):  # the request below says what is wrong, or is not
            content = _wait(_file_system(uri)[0], _result(asked), TIMEOUT_SECONDS + (wanted or 0) / SLOWEST)
        _count(Traffic(store_of(uri), 1, int(content is None), 0, time.monotonic() - began))
    if content is None:
        content = _request(uri, "cat_file", HERE, start=start, end=end, size=wanted or 2**24)
    if wanted is not None and len(content) > wanted:  # a web server that does not know ranges
        content = content[start:end]
    _count(Traffic(bytes=len(content)))
    return content


def read_ahead(uri: str, start: int, end: int) -> None:
    """Starts a request, so that a `read` of the same bytes finds it done or under way; does nothing if it cannot."""
    with contextlib.suppress(OSError, UserError):
        system, path = _file_system(uri)
        if not isinstance(system, AsyncFileSystem) or (uri, start, end) in _ahead:
            return
        if len(_ahead) == MOST_AHEAD:  # nobody has asked for the oldest
            _ahead.pop(next(iter(_ahead))).cancel()
        asked = system._cat_file(path, start=start, end=end)
        _ahead[uri, start, end] = asyncio.run_coroutine_threadsafe(asked, system.loop)


async def _result(asked: "Future[bytes]") -> bytes:
    return await asyncio.wrap_future(asked)


def stat(path: str | os.PathLike[str]) -> Stat:
    """Size and version of a local or remote file; OSError if it is missing, IsADirectoryError for a folder's."""
    if not is_uri(path := os.fspath(path)):
        found = os.stat(path)
        return Stat(found.st_size, found.st_mtime_ns)
    about = _request(path, "info", HERE)
    if about.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return _version(about)


def _version(about: dict[str, Any]) -> Stat:
    names = ("LastModified", "Last-Modified", "mtime", "updated", "last_modified", "ETag", "etag")
    changed = next((about[key] for key in names if about.get(key)), 0)
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
    version = int(seconds * 1e9) if isinstance(seconds, int | float) else zlib.crc32(str(seconds).encode())
    return Stat(int(about["size"] or 0), version)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a local or remote file, or a local folder."""
    if not is_uri(path):
        return os.path.exists(path)
    try:
        stat(path)
    except IsADirectoryError:
        return True
    except (FileNotFoundError, PermissionError):  # S3 refuses what is missing where listing is not allowed
        return False
    return True


def is_folder(path: str) -> bool:
    """Whether there is a local or remote folder."""
    if not is_uri(path):
        return os.path.isdir(path)
    with contextlib.suppress(FileNotFoundError):
        try:
            stat(path)
        except IsADirectoryError:
            return True
    return False


def files_below(folder: str) -> dict[str, Stat]:
    """The files of a local or remote folder at any depth, by their paths from it on, sorted; none if it is missing."""
    if not is_uri(uri := folder):
        paths = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        return {path.relative_to(folder).as_posix(): stat(path) for path in paths}
    found = _request(uri.rstrip("/"), "find", HERE, detail=True, size=2**28)
    root = _file_system(uri.rstrip("/"))[1].rstrip("/")
    names = {path[len(root) + 1 :]: about for path, about in found.items() if path.startswith(f"{root}/")}
    return {name: _version(about) for name, about in sorted(names.items()) if name}


def expand(path: str) -> list[str]:
    """The files that a pattern means, in order: {00..12} for numbers, * and ? for what is there."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        first, last = match[1], match[2]
        numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        return [name for number in numbers for name in expand(path[: match.start()] + number + path[match.end() :])]
    if not re.search(r"[*?]", path):
        return [path]
    if not is_uri(path):
        return sorted(glob.glob(path))
    system = _file_system(path)[0]
    return sorted(system.unstrip_protocol(name) for name in _request(path, "glob", HERE))


def put(file: Path, uri: str) -> None:
    """Copies a local file to a URI, where it appears whole or not at all, as far as the store can."""
    _request(uri, "put_file", str(file), HERE, size=file.stat().st_size)


def copy(uri: str, other: str) -> None:
    """Copies a file within its store."""
    _request(uri, "cp_file", HERE, _file_system(other)[1], size=2**32)


def remove(path: str) -> None:
    """Removes a local or remote file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _request(path, "rm_file", HERE) if is_uri(path) else os.unlink(path)


def local(path: str | os.PathLike[str]) -> Path:
    """A local file with the content of a file: itself, or a copy in the user's cache, made again where it changed."""
    if not is_uri(path := os.fspath(path)):
        return Path(path)
    version = stat(path)
    key = hashlib.sha256(repr((path, version)).encode()).hexdigest()[:16]
    copied = cache_folder() / "files" / key / os.path.basename(path.rstrip("/"))
    if not copied.exists():
        with appearing(copied) as partial:
            _request(path, "get_file", HERE, str(partial), size=version.bytes)
    return copied


def cache_folder() -> Path:
    """Where copies of remote files are kept: $OCTVIDEO_CACHE, or octvideo in the user's cache folder."""
    given = os.environ.get("OCTVIDEO_CACHE")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octvideo")


def check(uri: str) -> None:
    """Whether the store of a file can be used at all, found out in seconds: StoreError, with the reason, if not."""
    try:
        stat(uri)
    except IsADirectoryError:
        return
    except FileNotFoundError as error:
        bucket = store_of(uri)
        if uri.partition("://")[0] in PACKAGES and not _request(bucket, "exists", HERE):
            raise StoreError(f"{bucket} does not exist, or these credentials may not see it") from error
    except PermissionError as error:
        raise StoreError(f"{store_of(uri)}: no access: {error}") from error


class Mirror:
    """A folder of this machine that stands for a folder in a store, which holds what counts.

    A file is in the store whole or not at all, as far as its requests are (those of S3, Google and Azure are). What was
    not pushed is lost with the machine, and with the next `fetch`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        key = hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        self.folder = cache_folder() / "mirrors" / key / self.uri.rpartition("/")[2]
        self._record = self.folder.with_name("record.json")  # the version in the store of each file that is here

    def fetch(self) -> None:
        """Makes the folder what the store has; step checkpoints that are newer, because it did not answer, stay.

        UserError where a run of this machine is using the folder.
        """
        checkpoints = self.folder / "checkpoints"
        if checkpoints.is_dir():
            if (in_use := lock(checkpoints / ".lock")) is None:
                raise UserError(f"another run is writing to {self.uri}: choose another folder, or wait for its end")
            in_use.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._record.with_suffix(".lock").open("w") as locked:
            fcntl.lockf(locked, fcntl.LOCK_EX)  # another process of this machine may be at it
            known = json.loads(self._record.read_text()) if self._record.exists() else {}
            there, record = files_below(self.uri), {}
            for name, version in there.items():
                if name.endswith("last.ckpt"):  # a second name of another file
                    continue
                record[name] = [*version, *self._version(name)]
                if known.get(name) != record[name]:
                    with appearing(self.folder / name) as partial:
                        _request(child(self.uri, name), "get_file", HERE, str(partial), size=version.bytes)
                    record[name] = [*version, *self._version(name)]
            newest = max((name for name in there if STEP.search(name)), default="")
            for name in self._files() - there.keys():
                if STEP.search(name) and name not in known and name > newest:
                    log.warning("%s did not reach %s before: it is the newest checkpoint", name, self.uri)
                else:
                    (self.folder / name).unlink()
            self._write(record)

    def push(self) -> None:
        """Copies what is new here to the store, first what nothing else names, and removes there what is gone here."""
        known = json.loads(self._record.read_text()) if self._record.exists() else {}
        files = self._files()
        changed = [name for name in sorted(files) if known.get(name, [])[2:] != self._version(name)]
        sent: dict[tuple[int, int], str] = {}
        for name in sorted(changed, key=lambda name: not name.rpartition("/")[2].startswith("step_")):
            path, uri = self.folder / name, child(self.uri, name)
            found = path.stat()
            version = self._version(name)
            if (other := sent.get((found.st_dev, found.st_ino))) is not None:  # a link to a file that was sent
                copy(other, uri)
            else:
                put(path, uri)
            sent[found.st_dev, found.st_ino] = uri
            known[name] = [*stat(uri), *version]
            self._write(known)
        for name in known.keys() - files:
            remove(child(self.uri, name))
            del known[name]
        self._write(known)

    def _files(self) -> set[str]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        own = (path for path in paths if not path.name.startswith(".") and path.suffix != ".tmp")
        return {str(path.relative_to(self.folder)) for path in own}

    def _version(self, name: str) -> list[int]:
        """Size and time of change of a file here; of a link, of the file that it leads to."""
        path = self.folder / name
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else []

    def _write(self, record: dict[str, list[int]]) -> None:
        with appearing(self._record) as partial:
            partial.write_text(json.dumps(record))
