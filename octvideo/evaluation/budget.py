"""A time for each clip, held by switching the network's alpha while it runs."""

import logging
from collections import deque
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from octvideo.errors import UserError
from octvideo.models.checkpoint import Trained
from octvideo.models.elastic import AlphaPlans

log = logging.getLogger(__name__)
FURTHER = (0.125, 0.25, 0.5, 0.75)  # alphas to fall back to where only one was trained
ROUNDS = 3  # of timing each alpha at the start
WINDOW = 5  # newest times, whose median counts
HEADROOM = 0.85  # of the budget that a more accurate network may be expected to take
PATIENCE = 10, 160  # times until one is tried: at first, and after it turned out too slow again and again


class Budget:
    """Chooses a network's alpha so that a clip takes at most some time: the smallest, and most accurate, that does.

    Each alpha is timed at the start. From then on the time of each clip counts: where the median of the newest exceeds
    the budget, the network becomes a cheaper one, and with some headroom, after a while, a more accurate one again. All
    alphas are expected to slow down alike under load. Each switch is one line of the log (a warning).

    Args:
        trained: a network of a checkpoint; alphas are those of its elastic training. For another one they are its own
            and larger ones, with a warning, as it has no statistics for them.
        milliseconds: a clip may take, above 0.

    Raises UserError for a network without a single alpha.
    """

    def __init__(self, trained: Trained, milliseconds: float) -> None:
        own, elastic = trained.options.get("alpha"), trained.options.get("elastic")
        if not milliseconds > 0:
            raise UserError(f"the budget must be a positive number of milliseconds, got {milliseconds}")
        if not isinstance(own, float | int):
            raise UserError(f"a budget needs a checkpoint of one alpha in all stages, got {own}")
        self.seconds, self._network = milliseconds / 1000, trained.network
        self.alphas: list[float] = sorted(
            elastic["alphas"] if elastic else {own, *(alpha for alpha in FURTHER if alpha > own)}
        )
        if not elastic:
            shown = ", ".join(f"{alpha:g}" for alpha in self.alphas)
            what = f"the network was trained at alpha {own:g} alone: the batch-norm statistics of others are its own"
            log.warning("budget: %s, and they are less accurate; alphas %s", what, shown)
        self.alpha: float = own
        self.plans = AlphaPlans(trained.network, [own, *(alpha for alpha in self.alphas if alpha != own)])
        self.expected: dict[float, float] = {}  # seconds of a clip, by alpha
        self.last_seconds = 0.0  # of the newest clip
        self._recent = deque[float](maxlen=WINDOW)
        self._since, self._patience, self._rose, self._told = 0, PATIENCE[0], False, False

    def calibrate(self, run: Callable[[], Any]) -> None:
        """Times `run`, which scores one clip, at each alpha in turns, and takes the best that meets the budget."""
        taken: dict[float, list[float]] = {alpha: [] for alpha in self.alphas}
        for _ in range(1 + ROUNDS):
            for alpha, seconds in taken.items():
                self._set(alpha)
                start = perf_counter()
                run()
                seconds.append(perf_counter() - start)
        self.expected = {alpha: median(seconds[1:]) for alpha, seconds in taken.items()}  # the first takes longer
        self._set(self._best(self.seconds))
        times = ", ".join(f"{alpha:g} takes {1000 * seconds:.1f} ms" for alpha, seconds in self.expected.items())
        log.warning("budget %.4g ms a clip: alpha %s; it starts at %g", 1000 * self.seconds, times, self.alpha)

    def spent(self, seconds: float) -> None:
        """Counts the time that a clip took, and switches where that is called for."""
        self.last_seconds = seconds
        self._recent.append(seconds)
        self._since += 1
        now = median(self._recent)
        slowdown = now / self.expected[self.alpha]
        if now > self.seconds and len(self._recent) > WINDOW // 2:
            best = self._best(self.seconds / slowdown)
            if self.expected[best] < self.expected[self.alpha]:
                if self._rose:  # it was too slow before, and is again
                    self._patience = min(2 * self._patience, PATIENCE[1])
                self._switch(best, now, slowdown, rose=False)
            elif not self._told:
                self._told = True
                log.warning("budget: alpha %g, the fastest, takes %.1f ms", self.alpha, 1000 * now)
        elif self._since >= self._patience:
            best = self._best(HEADROOM * self.seconds / slowdown)
            if best < self.alpha:
                self._switch(best, now, slowdown, rose=True)
            elif self._rose:  # it has proved fast enough
                self._rose, self._patience = False, PATIENCE[0]

    def _best(self, seconds: float) -> float:
        """The smallest alpha that takes at most so long, or the fastest."""
        fitting = [alpha for alpha in self.alphas if self.expected[alpha] <= seconds]
        return min(fitting) if fitting else min(self.alphas, key=lambda alpha: self.expected[alpha])

    def _switch(self, alpha: float, now: float, slowdown: float, rose: bool) -> None:
        what = "budget: a clip takes %.1f ms at alpha %g, which becomes %g: %.1f ms expected"
        log.warning(what, 1000 * now, self.alpha, alpha, 1000 * slowdown * self.expected[alpha])
        self._set(alpha)
        self._recent.clear()
        self._since, self._rose, self._told = 0, rose, False

    def _set(self, alpha: float) -> None:
        self.alpha = alpha
        self.plans.switch(alpha)
        if (statistics := self._network.__dict__.get("alpha_statistics")) is not None:
            statistics.give(self._network, alpha)
