"""Microseconds a launch on a GPU: alone, in turn and together.

`hot` repeats one set of tensors, `cycled` goes through several in turn (a whole step reads more than the cache holds),
`together` replays a graph for each set on a stream of its own (several runs train at once).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
LAUNCHES = 40


class Clock(Protocol):
    """How calls are timed: microseconds a call."""

    def hot(self, calls: Sequence[Call]) -> float:
        """The first of the calls, again and again."""

    def cycled(self, calls: Sequence[Call], repeats: int = 9) -> float:
        """All calls in turn."""

    def together(self, calls: Sequence[Call]) -> float:
        """All calls at once, each on a stream of its own."""


class GraphClock:
    """CUDA graphs of 40 calls between two events."""

    def hot(self, calls: Sequence[Call]) -> float:
        return self._time(_graph([calls[0]] * LAUNCHES).replay, LAUNCHES)

    def cycled(self, calls: Sequence[Call], repeats: int = 9) -> float:
        many = [calls[i % len(calls)] for i in range(LAUNCHES)]
        return self._time(_graph(many).replay, LAUNCHES, repeats)

    def together(self, calls: Sequence[Call]) -> float:
        graphs = [_graph([call] * LAUNCHES) for call in calls]
        streams = [torch.cuda.Stream() for _ in graphs]

        def replay() -> None:
            main = torch.cuda.current_stream()
            for graph, stream in zip(graphs, streams):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    graph.replay()
            for stream in streams:
                main.wait_stream(stream)

        return self._time(replay, LAUNCHES * len(graphs))

    @staticmethod
    def _time(replay: Call, launches: int, repeats: int = 9) -> float:
        for _ in range(3):
            replay()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / launches)
        return round(median(times), 3)


def _graph(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    for call in dict.fromkeys(calls):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
