"""A process that decodes and resizes pictures for an encoder: reads requests, writes pixels, ends with its input.

It imports neither torch nor diffusers. Each line of its input is a request as JSON; the answer is a line of JSON,
`{"size": [width, height]}` followed by the RGB bytes, or `{"error": "..."}`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from dittocache.errors import DataError
from dittocache.families.pictures import PictureRequest, resized_picture


def main() -> None:
    """Serve requests from standard input until it ends, which is also when the parent dies."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library's stray print must not look like pixels
    try:
        serve(sys.stdin.buffer, answers)
    except BrokenPipeError:
        return  # nobody is left to answer


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer each request in turn."""
    for line in requests:
        try:
            picture = resized_picture(decoded_request(json.loads(line)))
        except DataError as error:
            answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
        else:
            answers.write(json.dumps({"size": picture.size}).encode() + b"\n")
            answers.write(picture.tobytes())
        answers.flush()


def encoded_request(request: PictureRequest) -> bytes:
    """A request as a line of JSON."""
    fields = {**vars(request), "path": os.fspath(request.path)}
    return json.dumps(fields).encode() + b"\n"


def decoded_request(fields: dict[str, Any]) -> PictureRequest:
    """The request that `encoded_request` wrote."""
    size = fields["size"]
    return PictureRequest(**{**fields, "path": Path(fields["path"]), "size": size and (size[0], size[1])})
