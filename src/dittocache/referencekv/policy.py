"""When reference tokens are computed anew: a decision from numbers alone."""

from __future__ import annotations


def refresh_now(refresh: int | None, reused: int | None) -> bool:
    """Whether this computed step runs the references too.

    Args:
        refresh: run them every so many computed steps; None: only once a run.
        reused: computed steps of this run and branch since they were run last; None before the first.
    """
    if reused is None:
        return True
    return refresh is not None and reused + 1 >= refresh
