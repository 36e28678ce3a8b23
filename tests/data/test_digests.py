"""The content index: no file is read twice while it does not change, and none is missed when it does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dittocache.data import digests
from dittocache.data.digests import ContentIndex, text_digest
from dittocache.data.snapshot import Snapshot
from dittocache.errors import DataError, StoreUnavailableError


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    read: list[str] = []
    real = digests.hash_file

    def recording(file: Path) -> str:
        read.append(file.name)
        return real(file)

    monkeypatch.setattr(digests, "hash_file", recording)
    return read


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as left alone for long, though they were just written."""
    monkeypatch.setattr(digests, "GRANULARITY_NS", -(10**10))


def test_a_digest_is_blake3_of_the_content(tmp_path: Path) -> None:
    content = os.urandom(digests._CHUNK_BYTES + 17)
    (tmp_path / "a").write_bytes(content)
    assert ContentIndex(tmp_path / "index.json").digest(tmp_path / "a") == blake3(content).hexdigest(length=16)
    assert text_digest("é") == blake3("é".encode()).hexdigest(length=16)


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_read_once_also_by_later_processes(tmp_path: Path, hashed: list[str]) -> None:
    (tmp_path / "a").write_bytes(b"content")
    for _ in range(3):
        index = ContentIndex(tmp_path / "cache" / "index.json")
        digest = index.digest(tmp_path / "a")
        assert index.digest(tmp_path / "a") == digest
        index.save()
    assert hashed == ["a"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["index.json"]


@pytest.mark.usefixtures("settled")
def test_a_change_behind_the_same_size_and_mtime_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"content")
    index = ContentIndex(tmp_path / "index.json")
    before, status = index.digest(file), file.stat()
    time.sleep(0.02)  # one tick of the kernel's coarse clock
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert index.digest(file) != before


def test_a_change_within_the_clocks_granularity_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is the same although the content is not, as on a file system that counts in seconds."""
    file = tmp_path / "a"
    file.write_bytes(b"content")
    status = digests.status_of(file)
    monkeypatch.setattr(digests, "status_of", lambda _: status)
    index = ContentIndex(tmp_path / "index.json")
    before = index.digest(file)
    index.save()
    file.write_bytes(b"CONTENT")
    assert index.digest(file) != before
    assert ContentIndex(tmp_path / "index.json").digest(file) != before


def test_a_file_read_long_after_its_last_change_is_trusted(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    now = time.time_ns()
    for seconds, reads in ((1, 1), (1.9, 2), (3, 3), (3, 3), (100, 3)):
        monkeypatch.setattr(digests.time, "time_ns", lambda later=seconds: now + int(later * 1e9))
        index = ContentIndex(tmp_path / "index.json")
        index.digest(tmp_path / "a")
        index.save()
        assert len(hashed) == reads


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"content")

    def grow(file: Path) -> str:
        file.write_bytes(b"more content")
        return "0" * 32

    monkeypatch.setattr(digests, "hash_file", grow)
    with pytest.raises(DataError, match="a changed while it was read"):
        ContentIndex(tmp_path / "index.json").digest(tmp_path / "a")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    index = ContentIndex(tmp_path / "index.json")
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file"):
        index.digest(tmp_path / "gone.png")
    with pytest.raises(DataError, match="Is a directory"):
        index.digest(tmp_path)


GOOD = '{"version":1,"files":{"/a":[1,2,3,4,"00112233445566778899aabbccddeeff"]}}'


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_index_is_started_afresh(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(GOOD.encode())
    start = data.draw(st.integers(0, len(content)))
    content[start : data.draw(st.integers(start, len(content)))] = data.draw(st.binary(max_size=20))
    folder = tmp_path_factory.mktemp("index")
    (folder / "index.json").write_bytes(content)
    (folder / "a").write_bytes(b"content")
    index = ContentIndex(folder / "index.json")
    assert index.digest(folder / "a") == blake3(b"content").hexdigest(length=16)
    index.save()
    assert str(folder / "a") in json.loads((folder / "index.json").read_bytes())["files"]


def test_processes_that_save_one_after_another_lose_nothing_of_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    first, second = (ContentIndex(tmp_path / "index.json") for _ in range(2))
    first.digest(tmp_path / "a")
    second.digest(tmp_path / "b")
    first.save()
    second.save()
    files = json.loads((tmp_path / "index.json").read_text())["files"]
    assert set(files) == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_an_index_that_cannot_be_written_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    index = ContentIndex(tmp_path / "cache" / "index.json")
    index.digest(tmp_path / "a")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreUnavailableError, match="Read-only file system"):
        index.save()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_snapshot_looks_at_each_file_once_and_tells_when_it_changed(tmp_path: Path, hashed: list[str]) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"content")
    snapshot = Snapshot(ContentIndex(tmp_path / "index.json"))
    assert snapshot.digest(file) == snapshot.digest(file)
    assert hashed == ["a"] and not snapshot.changed_since(file)
    time.sleep(0.02)
    file.write_bytes(b"CONTENT")
    assert snapshot.changed_since(file)
    file.unlink()
    assert snapshot.changed_since(file)


@pytest.mark.usefixtures("settled")
def test_large_files_are_read_ahead_with_progress_and_only_once(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_LARGE_BYTES", 100)
    files = [tmp_path / name for name in ("a", "b", "c")]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 1000 * (number + 1))
    told: list[tuple[int, int]] = []
    index = ContentIndex(tmp_path / "index.json", lambda done, total: told.append((done, total)))
    index.read_ahead([*files, tmp_path / "gone"])
    assert sorted(hashed) == ["a", "b", "c"] and told[-1] == (6000, 6000)
    assert [index.digest(file) for file in files] == [blake3(file.read_bytes()).hexdigest(length=16) for file in files]
    index.save()
    again = ContentIndex(tmp_path / "index.json")
    again.read_ahead(files)
    assert [again.digest(file) for file in files] == [index.digest(file) for file in files]
    assert len(hashed) == 3
