"""Pictures decoded ahead of the encoder, in processes of their own that know nothing of the device."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dittocache.embeddings.encoding.decode_worker import encoded_request
from dittocache.errors import DataError
from dittocache.families.pictures import PictureRequest, resized_picture

PICTURES_PER_PROCESS = 8  # starting a process takes as long as decoding a few
_ATTEMPTS = 2  # a process may have died of something that was not its picture's fault
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dittocache.embeddings.encoding.decode_worker import main; main()"
)


@dataclass
class _Ahead:
    picture: Future[Image.Image]
    users: int = 0


class PictureFeed:
    """Gives resized pictures to a family's `encode`; what was announced is decoded ahead. A context manager.

    Args:
        num_workers: most processes that decode; 0 decodes where a picture is asked for.

    The processes end with this one, however it ends; Ctrl-C in a terminal does not reach them.
    """

    def __init__(self, num_workers: int = 0) -> None:
        self._most = min(num_workers, os.cpu_count() or 1)
        self._ahead: dict[PictureRequest, _Ahead] = {}
        self._work: queue.SimpleQueue[tuple[PictureRequest, Future[Image.Image]] | None] = queue.SimpleQueue()
        self._decoders: list[_Decoder] = []

    def __enter__(self) -> PictureFeed:
        return self

    def __exit__(self, *_: object) -> None:
        for ahead in self._ahead.values():
            ahead.picture.cancel()
        self._ahead = {}
        for _decoder in self._decoders:
            self._work.put(None)
        for decoder in self._decoders:
            decoder.stop()
        self._decoders = []

    @property
    def processes(self) -> list[int]:
        """Process ids of the decoders."""
        return [decoder.process.pid for decoder in self._decoders if decoder.process is not None]

    def expect(self, pictures: int) -> None:
        """Start as many processes as this many pictures justify."""
        while len(self._decoders) < min(self._most, pictures // PICTURES_PER_PROCESS):
            self._decoders.append(_Decoder(self._work))
            self._decoders[-1].start()

    def announce(self, requests: Iterable[PictureRequest]) -> None:
        """Begin to decode; every announcement is to be taken back by `release`."""
        if not self._decoders:
            return
        for request in requests:
            if request not in self._ahead:
                self._ahead[request] = _Ahead(Future())
                self._work.put((request, self._ahead[request].picture))
            self._ahead[request].users += 1

    def release(self, requests: Iterable[PictureRequest]) -> None:
        """Forget pictures that nobody else has announced."""
        for request in requests:
            ahead = self._ahead.get(request)
            if ahead is not None:
                ahead.users -= 1
                if ahead.users <= 0:
                    ahead.picture.cancel()
                    del self._ahead[request]

    def __call__(self, request: PictureRequest) -> Image.Image:
        """The picture; raises DataError naming a file that cannot be read, or that kills the process decoding it."""
        ahead = self._ahead.get(request)
        return resized_picture(request) if ahead is None else ahead.picture.result()


class _Decoder(threading.Thread):
    """Hands requests to a process of its own and its answers to those who wait."""

    def __init__(self, work: queue.SimpleQueue[tuple[PictureRequest, Future[Image.Image]] | None]) -> None:
        super().__init__(name="picture-decoder", daemon=True)
        self.process: subprocess.Popen[bytes] | None = None
        self._work = work
        self._stopping = False

    def run(self) -> None:
        while not self._stopping and (item := self._work.get()) is not None:
            request, picture = item
            if not picture.set_running_or_notify_cancel():
                continue
            try:
                picture.set_result(self._decoded(request))
            except BaseException as error:
                picture.set_exception(error)
        self._end_process()

    def stop(self) -> None:
        """End thread and process without waiting for a picture in work."""
        self._stopping = True
        if self.process is not None:
            self.process.kill()
        self.join()

    def _decoded(self, request: PictureRequest) -> Image.Image:
        codes = []
        for _ in range(_ATTEMPTS):
            try:
                if self.process is None:
                    self.process = _started()
            except OSError:
                return resized_picture(request)  # no process to be had: slower, and no reason to fail
            try:
                return _answer(self.process, request)
            except DataError:
                raise
            except (EOFError, OSError, ValueError):
                codes.append(self._end_process())
                if self._stopping:
                    break
        raise DataError(
            f"picture {request.path} cannot be read: the process that decoded it died ({_cause(codes)}), as did the "
            "next one; replace it or remove its sample, or set cache.num_workers to 0 to see why"
        )

    def _end_process(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return process.wait()


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, json.dumps([str(entry) for entry in sys.path])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for the encoder, which ends its decoders itself
    )


def _answer(process: subprocess.Popen[bytes], request: PictureRequest) -> Image.Image:
    """What the process makes of a request; raises EOFError, OSError or ValueError when it died."""
    requests, answers = process.stdin, process.stdout
    if requests is None or answers is None:
        raise EOFError("the process has no pipes")
    requests.write(encoded_request(request))
    requests.flush()
    line = answers.readline()
    if not line:
        raise EOFError("the process ended")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise DataError(answer["error"])
    width, height = answer["size"]
    pixels = answers.read(width * height * 3)
    return Image.frombytes("RGB", (width, height), pixels)


def _cause(codes: list[int | None]) -> str:
    code = next((code for code in codes if code), 0)
    return f"signal {-code}" if code < 0 else f"exit code {code}"
