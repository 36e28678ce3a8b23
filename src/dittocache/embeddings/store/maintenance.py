"""One process at a time moves or removes records; whoever died at it left nothing that the next one does not finish.

The right is a lock of the operating system on the file `maintenance.lock`, which ends with its owner. The file also
says who the owner is and is touched while it works, for file systems that do not pass locks on to other machines.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dittocache.embeddings.store import writer_id
from dittocache.embeddings.store.local import LocalRecords
from dittocache.embeddings.store.loose import abandoned
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError

SILENT_SECONDS = 600.0  # an owner on another machine that has not touched the lock for so long is gone


class Maintenance:
    """The right to move and remove records of a store."""

    def __init__(self, records: LocalRecords, descriptor: int) -> None:
        self.records = records
        self._descriptor = descriptor

    def touch(self) -> None:
        """Show other machines that the work goes on."""
        os.utime(self._descriptor)


@contextmanager
def maintenance(records: LocalRecords) -> Iterator[Maintenance]:
    """Hold the right; what a dead owner left behind is put in order first.

    Raises CacheError naming the owner while another process has it; StoreUnavailableError when the store cannot be
    written.
    """
    path = records.root / "maintenance.lock"
    with ExitStack() as stack:
        with unavailable(f"the store {records.root} cannot be changed"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)  # and with it the lock
            _lock(descriptor, path)
            _recover(records)
        try:
            yield Maintenance(records, descriptor)
        except BaseException:
            with suppress(OSError):  # the next owner does it
                restore(records)
            raise
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)


def _lock(descriptor: int, path: Path) -> None:
    locked = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 200, 0).decode("ascii", "replace")
        raise CacheError(
            f"another process ({owner or 'starting'}) is packing or removing records of {path.parent}; "
            "wait until it has finished"
        ) from error
    except OSError:
        locked = False  # a file system without locks: the owner's name has to do
    owner = os.pread(descriptor, 200, 0).decode("ascii", "replace")
    machine = writer_id.current().partition("-")[0]
    elsewhere = not owner.startswith(f"{machine}-")
    silent = time.time() - os.fstat(descriptor).st_mtime
    if owner and (elsewhere or not locked) and silent < SILENT_SECONDS and not writer_id.is_dead(owner):
        raise CacheError(
            f"another process ({owner}) was packing or removing records of {path.parent} {silent:.0f} s ago; "
            f"wait until it has finished, or, if it was killed on another machine, {SILENT_SECONDS:.0f} s"
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, writer_id.current().encode("ascii"), 0)


def _recover(records: LocalRecords) -> None:
    """Undo removals that were not finished; remove half-written packs."""
    restore(records)
    for temporary in list(abandoned(records.packed.folder)):
        temporary.unlink(missing_ok=True)


def to_trash(records: LocalRecords, key: str) -> Path | None:
    """Take a loose record out, so that it can still be put back; None when it is not there."""
    source = records.loose.path(key)
    target = records.trash / source.name
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if source.exists():  # it is the trash that is missing
            records.trash.mkdir(parents=True, exist_ok=True)
            return to_trash(records, key)
        return None
    return target


def put_back(records: LocalRecords, trashed: Path) -> None:
    """Make a record in the trash a loose one again; one that was written meanwhile stays."""
    target = records.loose.path(trashed.name.partition(".")[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        trashed.unlink(missing_ok=True)
    else:
        os.replace(trashed, target)


def restore(records: LocalRecords) -> None:
    """Put everything back that lies in the trash."""
    if records.trash.is_dir():
        for trashed in records.trash.glob("*.safetensors"):
            put_back(records, trashed)
