"""An S3 server on this machine for tests and measurements: moto's, with faults on demand.

python experiments/s3_server.py --port 5555 [--fail 0.05] [--hang 0.01] [--slow SECONDS] [--log FILE]

--fail   share of the requests for objects that are answered with 503
--hang   share of them that are never answered
--slow   seconds that each of them waits

It keeps everything in memory. Clients need AWS_ENDPOINT_URL=http://127.0.0.1:PORT and any AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY. Every 100 requests the counts of all and of injected faults are written to the log.
"""

import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple

from octvideo.commands.options import Parser


class Faulty:
    """A WSGI application that fails now and then, by a seed."""

    def __init__(self, application: Any, fail: float, hang: float, slow: float, log: Path | None) -> None:
        self.application, self.fail, self.hang, self.slow, self.log = application, fail, hang, slow, log
        self.random, self.counts = random.Random(0), {"requests": 0, "failed": 0, "hung": 0}
        self.lock, self.numbers = threading.Lock(), itertools.count(1)

    def __call__(self, environment: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        """Answers a request."""
        is_object = environment["PATH_INFO"].count("/") > 1
        with self.lock:
            drawn, number = self.random.random() if is_object else 1.0, next(self.numbers)
            self.counts["requests"] = number
            self.counts["failed"] += drawn < self.fail
            self.counts["hung"] += self.fail <= drawn < self.fail + self.hang
            if self.log is not None and (number % 20 == 0 or drawn < self.fail + self.hang):
                self.log.write_text(json.dumps(self.counts))
        time.sleep(self.slow if is_object else 0)
        if drawn < self.fail:
            respond("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        if drawn < self.fail + self.hang:
            time.sleep(3600)
        answer: Iterable[bytes] = self.application(environment, respond)
        return answer


class Quiet(WSGIRequestHandler):
    """Keeps connections open, and prints nothing."""

    protocol_version = "HTTP/1.1"

    def log(self, *_: Any, **__: Any) -> None:
        """Prints nothing."""


def main(words: list[str]) -> None:
    """Serves until it is killed."""
    parser = Parser(__doc__)
    parser.add_argument("--port", type=int, required=True)
    for name in ("--fail", "--hang", "--slow"):
        parser.add_argument(name, type=float, default=0.0)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args(words)
    application = DomainDispatcherApplication(create_backend_app)
    faulty = Faulty(application, options.fail, options.hang, options.slow, options.log)
    run_simple("127.0.0.1", options.port, faulty, threaded=True, request_handler=Quiet)


if __name__ == "__main__":
    main(sys.argv[1:])
