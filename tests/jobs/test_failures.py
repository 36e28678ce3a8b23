"""Hints for known causes, from return codes and words alone."""

import pytest

from dittocache.jobs.failures import describe_returncode, hint_for, last_lines


@pytest.mark.parametrize(
    ("returncode", "text", "expected"),
    [
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "memory ran out"),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "memory ran out"),
        (1, "OSError: [Errno 28] No space left on device: 'x'", "the disk is full"),
        (1, "SafetensorError: I/O error: No space left on device (os error 28)", "the disk is full"),
        (1, "PermissionError: [Errno 13] Permission denied: '/cache'", "cannot be written"),
        (1, "FileNotFoundError: [Errno 2] No such file or directory: 'x.png'", "is missing"),
        (1, "ModuleNotFoundError: No module named 'peft'", "a package is missing"),
        (1, "RuntimeError: CUDA error: no kernel image is available for execution", "does not fit the GPU"),
        (-9, "", "the system ended the process"),
        (-11, "", "a native library crashed"),
        (1, "ZeroDivisionError: division by zero", ""),
    ],
)
def test_known_causes_have_a_hint_and_others_none(returncode: int, text: str, expected: str) -> None:
    hint = hint_for(returncode, text)
    assert hint == "" if not expected else expected in hint


def test_a_named_cause_wins_over_the_signal() -> None:
    assert "the disk is full" in hint_for(-9, "No space left on device")


def test_the_end_of_a_log_without_empty_lines_and_overwritten_progress() -> None:
    text = "first\n\nsecond\n 10%|#  |\r100%|###|\n\nlast\n"
    assert last_lines(text, 3) == "second\n100%|###|\nlast"
    assert last_lines("", 3) == ""


def test_return_codes_in_words() -> None:
    assert describe_returncode(2) == "return code 2"
    assert describe_returncode(-9) == "ended by signal SIGKILL"
    assert describe_returncode(-77) == "ended by signal 77"
