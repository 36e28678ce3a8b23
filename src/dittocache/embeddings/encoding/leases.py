"""Leases: which process encodes which shard, agreed on by files in a folder that all of them see.

A lease is a file `SHARD.GENERATION` that holds its owner's id (`store/writer_id.py`). It is created with O_EXCL, so one
process gets it, whoever else tries. Its owner touches it from time to time; untouched for `seconds` it has expired, and
an owner that died on this machine has lost it at once. Who takes over an abandoned lease creates the next generation,
with O_EXCL again: one thief wins, nothing is renamed or removed that another may rely on, and a thief that dies in
mid-theft leaves nothing behind that would have to expire in turn. The highest generation holds.

Ages are differences of times that the file system itself set: clocks of hosts may disagree. A lease saves work and
guards nothing: records are immutable and written atomically, so at worst two processes encode the same shard.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from dittocache.embeddings.store import writer_id
from dittocache.errors import StoreUnavailableError

FOLDER = "leases"
_CLOCK = ".clock."
_RENEWALS = 4  # a lease is touched this often before it would expire


class Lease:
    """The right to encode one shard; given back by `release` or at the end of a `with` block.

    Attributes:
        name: the shard.
        generation: 0, or one more than that of the lease that was taken over.
        taken_from: the former owner of a lease that was taken over, else None.
        lost: True from the moment that another process is seen to have taken it over.
    """

    def __init__(self, leases: Leases, name: str, generation: int, taken_from: str | None) -> None:
        self.name = name
        self.generation = generation
        self.taken_from = taken_from
        self.lost = False
        self._leases = leases

    def release(self) -> None:
        """Give the shard back; a lease that is lost or released already stays as it is."""
        self._leases._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Leases:
    """The leases of one folder, as one process sees and holds them; a context manager that gives all back.

    Args:
        folder: created by the first claim; every process that shares the work must see it.
        seconds: after this time without renewal a lease has expired. The same for all processes.
        owner: id of this process, as `writer_id.current()` makes it.

    While a lease is held, a thread renews it. Methods raise StoreUnavailableError when the folder cannot be used.
    """

    def __init__(self, folder: Path, seconds: float = 60.0, owner: str | None = None) -> None:
        self.folder = folder
        self.seconds = seconds
        self.owner = owner or writer_id.current()
        self._held: dict[str, Lease] = {}
        self._changed = threading.Lock()
        self._closed = threading.Event()
        self._renewer: threading.Thread | None = None

    def claim(self, name: str) -> Lease | None:
        """The lease of a shard that nobody holds or whose holder is gone; None while another has it, or this one."""
        with self._available():
            generations = self._generations(name)
            current = max(generations, default=-1)
            holder = self._holder(name, current) if generations else None
            if generations and (holder is None or not self._abandoned(name, current, holder)):
                return None  # held, or given back this moment: the next claim will see
            if not self._create(self._path(name, current + 1)):
                return None
        lease = Lease(self, name, current + 1, taken_from=holder)
        with self._changed:
            self._held[name] = lease
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew_until_closed, name="lease-renewer", daemon=True)
                self._renewer.start()
        return lease

    def holder_of(self, name: str) -> str | None:
        """Id of the process that holds the shard; empty while that process is writing it; None when nobody does."""
        with self._available():
            generations = self._generations(name)
            return self._holder(name, max(generations)) if generations else None

    def renew(self) -> None:
        """Show that this process is alive, for every lease it holds; notice those that others have taken over."""
        with self._changed:
            held = list(self._held.values())
        for lease in held:
            try:
                if max(self._generations(lease.name), default=-1) != lease.generation:
                    lease.lost = True
                else:
                    os.utime(self._path(lease.name, lease.generation))
            except FileNotFoundError:
                lease.lost = True
            except OSError:
                continue  # a share that is away for a moment; if it stays away, the lease expires as it should
            if lease.lost:
                self._forget(lease)

    def sweep(self) -> int:
        """Remove the leases whose holders are gone, and return how many shards were held by them."""
        removed = 0
        with self._available():
            if not self.folder.is_dir():
                return 0
            entries = sorted(os.listdir(self.folder))
            for name in dict.fromkeys(entry.rpartition(".")[0] for entry in entries if not entry.startswith(".")):
                lease = self.claim(name)  # a thief like any other: no claim of another process is disturbed
                if lease is not None:
                    lease.release()
                    removed += lease.taken_from is not None
            for entry in entries:
                if entry.startswith(_CLOCK) and writer_id.is_dead(entry.removeprefix(_CLOCK)):
                    (self.folder / entry).unlink(missing_ok=True)
        return removed

    def close(self) -> None:
        """Give back every lease and stop renewing."""
        self._closed.set()
        for lease in list(self._held.values()):
            lease.release()
        with suppress(OSError):
            self._clock.unlink()
        if self._renewer is not None:
            self._renewer.join()

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _release(self, lease: Lease) -> None:
        if self._held.get(lease.name) is not lease:
            return
        self._forget(lease)
        with suppress(OSError):  # what cannot be removed now expires later
            generations = sorted(self._generations(lease.name))
            if generations and generations[-1] == lease.generation:
                for generation in generations:  # the own one last: until then the shard counts as held
                    self._path(lease.name, generation).unlink(missing_ok=True)

    def _forget(self, lease: Lease) -> None:
        with self._changed:
            if self._held.get(lease.name) is lease:
                del self._held[lease.name]

    def _renew_until_closed(self) -> None:
        while not self._closed.wait(self.seconds / _RENEWALS):
            self.renew()

    def _abandoned(self, name: str, generation: int, holder: str) -> bool:
        if writer_id.is_dead(holder):
            return True
        try:
            touched = _modified(self._path(name, generation))
        except FileNotFoundError:
            return False
        return self._now() - touched > self.seconds

    def _now(self) -> float:
        """The file system's own time."""
        descriptor = os.open(self._clock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.close(descriptor)
        os.utime(self._clock)
        return _modified(self._clock)

    @property
    def _clock(self) -> Path:
        return self.folder / f"{_CLOCK}{self.owner}"

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}"

    def _generations(self, name: str) -> list[int]:
        """Of all files of this shard's lease; empty when nobody holds it."""
        try:
            entries = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        suffixes = [entry.removeprefix(f"{name}.") for entry in entries if entry.startswith(f"{name}.")]
        return [int(suffix) for suffix in suffixes if suffix.isdecimal()]

    def _holder(self, name: str, generation: int) -> str | None:
        try:
            return self._path(name, generation).read_text(errors="replace")
        except FileNotFoundError:
            return None

    def _create(self, path: Path) -> bool:
        """Create a lease's file; False when another process was faster."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self._create(path)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self.owner.encode())
        finally:
            os.close(descriptor)
        return True

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailableError:
            raise
        except OSError as error:
            raise StoreUnavailableError(
                f"leases cannot be written to {self.folder} ({error.strerror or error}): workers cannot agree on who "
                "encodes what; free space, change the folder's rights or choose another cache_dir"
            ) from error


def _modified(path: Path) -> float:
    """When the file was touched last. Opening it first makes network file systems ask their server, not a memory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
