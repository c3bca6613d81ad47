"""Where the time of a run goes: spans of time by name, as a table and as a trace for chrome://tracing and Perfetto."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

LARGEST = 200_000  # spans in a trace; sums are of all


class Profile:
    """Spans of time that stand in each other. A name's own seconds are those of its spans without the spans inside.

    So the own seconds of all names add up to the seconds of the outermost spans.
    """

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self.count: dict[str, int] = {}
        self.spans: list[tuple[str, float, float]] = []  # name, start, seconds; the first LARGEST to end
        self.inside = [0.0]  # seconds of the spans inside each open span; the first is of the outermost spans
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """The seconds of the outermost spans."""
        return self.inside[0]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The time of the block is of this name."""
        self.inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            inside = self.inside.pop()
            self.inside[-1] += seconds
            self.own[name] = self.own.get(name, 0.0) + seconds - inside
            self.count[name] = self.count.get(name, 0) + 1
            if len(self.spans) < LARGEST:
                self.spans.append((name, start - self.start, seconds))

    def timed(self, name: str, function: Callable[..., Any]) -> "Timed":
        """The function, with every call in a span of this name."""
        return Timed(self, name, function)

    def table(self) -> str:
        """A line for each name: its own seconds, their share of all, and how often it came; the largest first."""
        width = max(map(len, self.own), default=0)
        lines = [f"where {self.seconds:.2f} s went:"]
        for name, own in sorted(self.own.items(), key=lambda x: -x[1]):
            share = own / max(self.seconds, 1e-9)
            lines.append(f"  {name:{width}}  {own:10.3f} s  {share:6.1%}  {self.count[name]:,} times")
        return "\n".join(lines)

    def trace(self) -> dict[str, Any]:
        """The spans in the Trace Event Format, as complete events ("X") in microseconds."""
        events = [
            {"name": name, "ph": "X", "ts": 1e6 * start, "dur": 1e6 * seconds, "pid": 0, "tid": 0}
            for name, start, seconds in self.spans
        ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def watch(self, learner: Any, sample: Any, names: tuple[str, str, str]) -> None:
        """Put the pieces of a learner in spans. names: of the sampler, of the wrappers around it, and of the update."""
        inner, outer, update = names
        if learner.sample is sample:
            learner.sample = self.timed(inner, sample)
        else:
            around = learner.sample
            while around.sample is not sample:
                around = around.sample
            around.sample = self.timed(inner, sample)
            learner.sample = self.timed(outer, learner.sample)
        learner.credit, learner.update = self.timed("credit", learner.credit), self.timed(update, learner.update)
        given = {name: x for name, x in learner.loop.keywords.items() if name in ("fit", "diagnose")}
        fitted = {name: self.timed(update, x) for name, x in given.items() if hasattr(x, "critic") or name != "fit"}
        learner.loop = partial(learner.loop, **fitted)


class Timed:
    """A function, or an object that is called, with every call in a span. Everything else is the object's own."""

    def __init__(self, profile: Profile, name: str, function: Any) -> None:
        self._profile, self._name, self._function = profile, name, function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self._profile.span(self._name):
            return self._function(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)
