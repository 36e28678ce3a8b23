"""What to tell a person whose stage failed, decided from its return code and its last words alone."""

from __future__ import annotations

import signal

_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("outofmemoryerror", "out of memory", "can't allocate memory", "not enough memory", "memory ran out"),
        "memory ran out: lower train.batch_size, cache.batch_size or data.resolution, or close other programs",
    ),
    (
        ("no space left on device", "disk quota exceeded", "errno 28"),
        "the disk is full: free space, or move cache.cache_dir or output_dir to another disk",
    ),
    (
        ("permission denied", "read-only file system"),
        "a folder cannot be written: check the rights of cache.cache_dir and output_dir",
    ),
    (
        ("modulenotfounderror", "no module named"),
        "a package is missing in this Python: install dittocache again (`make setup`, or `pip install dittocache`)",
    ),
    (
        ("filenotfounderror", "no such file or directory", "does not exist"),
        "a file that the settings name is missing: check the paths of model.path, data.path and generate.image",
    ),
    (
        ("localentrynotfounderror", "offline mode is enabled", "hf_hub_offline"),
        "the model is not on this machine: download it first with `hf download`, or give its folder as model.path",
    ),
    (
        ("no kernel image is available", "cuda driver version is insufficient", "torch not compiled with cuda"),
        "this build of torch does not fit the GPU: install the build for its driver, or set model.device to cpu",
    ),
)

STOPPED = 130
"""Exit code of a stage that ended in good order because it was asked to (a shell's code for Ctrl-C)."""

STOPPED_CODES = frozenset({STOPPED, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGTERM})
"""Return codes of a stage that ended because it was asked to."""


def hint_for(returncode: int, text: str) -> str:
    """A sentence about the likely cause, from the return code and the end of the stage's output; empty if unknown."""
    words = text.lower()
    for signs, hint in _HINTS:
        if any(sign in words for sign in signs):
            return hint
    if returncode == -signal.SIGKILL:
        return (
            "the system ended the process, most often because memory ran out: lower train.batch_size, "
            "cache.batch_size or data.resolution; what was finished is kept"
        )
    if returncode in (-signal.SIGSEGV, -signal.SIGILL, -signal.SIGBUS):
        return "a native library crashed: the installed torch may not fit this machine"
    return ""


def last_lines(text: str, count: int = 12) -> str:
    """The end of a log, without progress bars' carriage returns and empty lines."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def describe_returncode(returncode: int) -> str:
    """`return code 1`, or which signal ended the process."""
    if returncode >= 0:
        return f"return code {returncode}"
    try:
        return f"ended by signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"ended by signal {-returncode}"
