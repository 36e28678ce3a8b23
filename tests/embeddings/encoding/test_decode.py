"""Decoding ahead: the same pixels as in line, whatever becomes of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dittocache.embeddings.encoding import decode
from dittocache.embeddings.encoding.decode import PICTURES_PER_PROCESS, PictureFeed
from dittocache.errors import DataError
from dittocache.families.pictures import PictureRequest, resized_picture


def requests_in(folder: Path, count: int = 16) -> list[PictureRequest]:
    """Requests of both kinds, for pictures with EXIF, alpha, palette and a name that is no ASCII."""
    requests = []
    for number in range(count):
        path = folder / f"bild {number} ä.png"
        picture = Image.effect_noise((40 + number, 33), 90.0).convert(("RGB", "RGBA", "P", "L")[number % 4])
        exif = picture.getexif()
        exif[0x0112] = 1 + number % 8
        picture.save(path, exif=exif)
        ways: tuple[dict[str, Any], ...] = (
            {"area": 1024, "multiple": 16},
            {"size": (32, 48)},
            {"size": (32, 48), "flipped": True},
            {"size": (32, 48), "cropped": True},
            {"multiple": 16},
        )
        requests.append(PictureRequest(path, **ways[number % len(ways)]))
    return requests


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def started(requests: list[PictureRequest], feed: PictureFeed) -> PictureFeed:
    feed.expect(len(requests))
    feed.announce(requests)
    return feed


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_bit_for_bit_those_of_this_process(tmp_path: Path, workers: int) -> None:
    requests = requests_in(tmp_path)
    with started(requests, PictureFeed(workers)) as feed:
        assert bool(feed._decoders) == bool(workers)
        for request in requests:
            picture = feed(request)
            assert (picture.mode, picture.size) == ("RGB", resized_picture(request).size)
            assert picture.tobytes() == resized_picture(request).tobytes()


def test_few_pictures_start_no_process(tmp_path: Path) -> None:
    with PictureFeed(8) as feed:
        feed.expect(PICTURES_PER_PROCESS - 1)
        assert not feed._decoders
        feed.expect(PICTURES_PER_PROCESS)
        assert len(feed._decoders) == 1
        feed.expect(1000)
        assert len(feed._decoders) == min(8, os.cpu_count() or 1)


def test_a_bad_picture_is_named_and_harms_no_other(tmp_path: Path) -> None:
    requests = requests_in(tmp_path)
    requests[3].path.write_bytes(b"no picture")
    with started(requests, PictureFeed(1)) as feed:
        with pytest.raises(DataError, match="bild 3 ä.png cannot be read"):
            feed(requests[3])
        assert feed(requests[4]).tobytes() == resized_picture(requests[4]).tobytes()


def test_a_killed_process_is_replaced(tmp_path: Path) -> None:
    requests = requests_in(tmp_path)
    with PictureFeed(1) as feed:
        feed.expect(len(requests))
        feed.announce(requests[:1])
        feed(requests[0])
        [before] = feed.processes
        os.kill(before, signal.SIGKILL)
        feed.announce(requests[1:])
        for request in requests[1:]:
            assert feed(request).tobytes() == resized_picture(request).tobytes()
        assert feed.processes != [before]


def test_a_picture_that_kills_every_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = (
        "import os, signal, dittocache.embeddings.encoding.decode_worker as worker\n"
        "def kill(request): os.kill(os.getpid(), signal.SIGKILL)\n"
        "real = worker.resized_picture\n"
        "worker.resized_picture = lambda request: (kill if 'bild 2 ' in str(request.path) else real)(request)\n"
    )
    import_worker, run_worker = decode._CODE.split("from ")
    monkeypatch.setattr(decode, "_CODE", f"{import_worker}\n{deadly}from {run_worker}")
    requests = requests_in(tmp_path)
    with started(requests, PictureFeed(2)) as feed:
        with pytest.raises(DataError, match=r"bild 2 ä.png cannot be read: .* died \(signal 9\)"):
            feed(requests[2])
        for request in (requests[0], *requests[3:]):
            assert feed(request).tobytes() == resized_picture(request).tobytes()


def test_what_is_released_is_forgotten_and_what_is_shared_is_kept(tmp_path: Path) -> None:
    requests = requests_in(tmp_path, 8)
    with PictureFeed(1) as feed:
        feed.expect(8)
        feed.announce([requests[0], requests[0], requests[1]])
        feed.release(requests[:2])
        assert list(feed._ahead) == [requests[0]]
        feed.release(requests[:1])
        assert not feed._ahead
        assert feed(requests[1]).tobytes() == resized_picture(requests[1]).tobytes()


def test_processes_end_with_the_feed_also_after_an_error(tmp_path: Path) -> None:
    requests = requests_in(tmp_path)
    with pytest.raises(KeyboardInterrupt), started(requests, PictureFeed(2)) as feed:
        feed(requests[0])
        processes = feed.processes
        raise KeyboardInterrupt
    assert processes and not any(map(is_alive, processes))


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    requests_in(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from dittocache.embeddings.encoding.decode import PictureFeed\n"
        "from tests.embeddings.encoding.test_decode import requests_in, started\n"
        "requests = requests_in(Path(sys.argv[1]))\n"
        "feed = started(requests, PictureFeed(2))\n"
        "[feed(request) for request in requests]\n"
        "print(*feed.processes, flush=True); time.sleep(60)\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(tmp_path), str(root)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as output:
        processes = [int(pid) for pid in output.readline().split()]
    assert processes and all(map(is_alive, processes))
    parent.kill()
    parent.wait()
    until(lambda: not any(map(is_alive, processes)))


def test_the_process_loads_neither_torch_nor_diffusers() -> None:
    modules = "print('torch' in sys.modules, 'numpy' in sys.modules)"
    code = f"import sys, dittocache.embeddings.encoding.decode_worker; {modules}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
