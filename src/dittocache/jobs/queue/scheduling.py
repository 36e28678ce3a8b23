"""Which jobs may begin: a decision from names of devices alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dittocache.jobs.queue.job import Job


def startable(waiting: Sequence[Job], busy: Collection[str]) -> list[Job]:
    """The waiting jobs, in their order, whose devices are all free.

    A job that waits keeps its devices from those behind it: else one that needs two devices could wait for ever.

    Args:
        busy: devices that jobs are running on.
    """
    taken = set(busy)
    chosen = []
    for job in waiting:
        if taken.isdisjoint(job.devices):
            chosen.append(job)
        taken.update(job.devices)
    return chosen
