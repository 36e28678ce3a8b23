"""A loss curve of bounded length: exact while it is short, averages of neighbours once it is long."""

from __future__ import annotations

from collections.abc import Iterator

MOST_POINTS = 2000


class LossCurve:
    """Points (step, loss) in the order of steps; beyond `most` of them, every two neighbours become their mean.

    What a curve holds depends on the points it was given alone, not on when it was looked at.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._steps: list[int] = []  # the last step that a point stands for
        self._sums: list[float] = []
        self._counts: list[int] = []
        self._width = 1  # steps that a full point stands for

    def add(self, step: int, loss: float) -> None:
        """Add the loss of a step; a training that went back to a checkpoint does its later steps again."""
        if self._steps and step <= self._steps[-1]:
            self.cut(step - 1)
        if self._steps and self._counts[-1] < self._width:
            self._steps[-1] = step
            self._sums[-1] += loss
            self._counts[-1] += 1
        else:
            self._steps.append(step)
            self._sums.append(loss)
            self._counts.append(1)
        if len(self._steps) > self._most:
            self._halve()

    def cut(self, step: int) -> None:
        """Forget every point that stands for a step after this one."""
        while self._steps and self._steps[-1] > step:
            for values in (self._steps, self._sums, self._counts):
                values.pop()
        if not self._steps:
            self._width = 1

    def points(self) -> tuple[tuple[int, float], ...]:
        """The curve so far."""
        return tuple(self._means())

    def _means(self) -> Iterator[tuple[int, float]]:
        for step, total, count in zip(self._steps, self._sums, self._counts, strict=True):
            yield step, total / count

    def _halve(self) -> None:
        pairs = range(0, len(self._steps), 2)
        self._steps = [self._steps[first : first + 2][-1] for first in pairs]
        self._sums = [sum(self._sums[first : first + 2]) for first in pairs]
        self._counts = [sum(self._counts[first : first + 2]) for first in pairs]
        self._width *= 2
