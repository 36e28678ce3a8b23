"""Records in a folder of this machine or of a mount: packed or loose, whichever is found, while others move them."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dittocache.embeddings.store.durable import replace_file
from dittocache.embeddings.store.loose import SUFFIX, LooseRecords, OpenRecord, abandoned, read_bytes
from dittocache.embeddings.store.pack_index import Place
from dittocache.embeddings.store.packs import PackedRecords

_LOOKS = 8  # how often the index may change under a reader that looks for one key


class LocalRecords:
    """The records below one folder; every method may raise OSError.

    Attributes:
        loose, packed: where they are.
        trash: folder of loose records that are being removed, for as long as that may be undone.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loose = LooseRecords(root)
        self.packed = PackedRecords(root)
        self.trash = root / "trash"

    @contextmanager
    def opened(self, key: str) -> Iterator[OpenRecord]:
        """The file that holds the record, for reading; raises FileNotFoundError.

        A packer or gc may move the record at any moment: loose records go only after an index names their pack, and
        packs only after an index names another. So whoever finds neither looks again as long as the index changes.
        """
        path = self.loose.path(key)
        with ExitStack() as stack:
            yield self._open(key, path, stack)

    def _open(self, key: str, path: Path, stack: ExitStack) -> OpenRecord:
        for _ in range(_LOOKS):
            before = self.packed.snapshot
            for place in (self.packed, self.loose):
                try:
                    return stack.enter_context(place.opened(key))
                except FileNotFoundError:
                    continue
            self.packed.refresh()
            if self.packed.snapshot is before:  # another thread may have loaded the new one
                break
        descriptor = os.open(self.trash / path.name, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        return OpenRecord(descriptor, 0, os.fstat(descriptor).st_size)

    def sizes(self, keys: Collection[str]) -> dict[str, int]:
        """Length in bytes of the records that are there and whole, as far as can be told without reading them."""
        listed = list(keys)
        found = self.packed.sizes(listed)
        if not found:
            return self.loose.sizes(keys)
        if len(found) == len(listed):
            return found
        return found | self.loose.sizes([key for key in listed if key not in found])

    def keys(self) -> Iterator[str]:
        """Keys of all records, each once, in no particular order."""
        yield from self.packed.keys()
        for key in self.loose.keys():  # noqa: SIM118
            if self.packed.find(key) is None:
                yield key

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Store records loose; packed ones of the same keys do not count any more."""
        self.loose.write(contents)
        self.packed.refresh()
        for key, content in contents.items():
            while (place := self.packed.find(key)) is not None:
                self.packed.drop(key, place.pack)
                # A packer that had not yet seen this may have taken the new record for a copy of the packed one.
                if not self.loose.path(key).exists():
                    self.loose.write({key: content})

    def quarantine(self, key: str, record: OpenRecord) -> str:
        """Take the record that was read out of the store, keep a copy, and say where that is."""
        shelter = self.root / "quarantine"
        target = shelter / f"{key}.{time.time_ns()}{SUFFIX}"
        try:
            if record.pack is None:
                path = self.loose.path(key)
                if not os.path.samestat(os.stat(path), os.fstat(record.descriptor)):
                    return "another process has replaced it meanwhile"
                shelter.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            else:
                self.packed.refresh()
                if self.packed.find(key) != Place(record.pack, record.offset, record.length):
                    return "another process has replaced it meanwhile"
                path = self.packed.path(record.pack)
                self.packed.drop(key, record.pack)
                shelter.mkdir(parents=True, exist_ok=True)
                replace_file(target, bytes(read_bytes(record)))
        except FileNotFoundError:
            return "another process has taken it out of the store meanwhile"
        except OSError as error:
            return f"it could not be moved to {shelter} ({error.strerror or error}): remove {path}"
        return f"it was moved to {target}"

    def temporaries(self) -> Iterator[Path]:
        """What dead writers left half-written."""
        yield from self.loose.temporaries()
        for folder in (self.packed.folder, self.root, self.root / "roots", self.root / "quarantine"):
            yield from abandoned(folder)
