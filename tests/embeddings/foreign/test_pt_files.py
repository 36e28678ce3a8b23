"""`.pt` files: tensors only, nothing executed, an error of ours or the right tensor."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dittocache.embeddings.foreign.pt_files import parse_pt, pt_bytes, read_pt
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

TENSORS = [
    torch.arange(24, dtype=torch.float32).reshape(4, 6),
    torch.randn(3, 5).bfloat16(),
    torch.tensor([True, False]),
    torch.tensor([[1, 2, 3]], dtype=torch.int32),
    torch.tensor(7),
    torch.empty(0, 64),
]


class Program:
    """Pickles as a call: what a malicious file would do when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}")
def test_a_tensor_comes_back_bit_for_bit(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(pt_bytes(tensor))
    for found in (read_pt(path), torch.load(path, weights_only=False), parse_pt(saved(tensor), "qflux's")):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_lists_and_dicts_of_tensors(tmp_path: Path) -> None:
    value = {"a": [TENSORS[0], TENSORS[1]], "b": TENSORS[2]}
    found = parse_pt(saved(value), "a.pt")
    assert isinstance(found, dict)
    assert torch.equal(found["a"][1], TENSORS[1])  # type: ignore[index, arg-type, call-overload]
    assert set(parse_pt(pt_bytes(value), "a.pt")) == {"a", "b"}
    assert len(parse_pt(saved((TENSORS[0], TENSORS[0])), "a.pt")) == 2


def test_a_view_is_saved_alone() -> None:
    assert len(pt_bytes(torch.zeros(1_000_000)[:2])) < 5000


def test_a_program_is_refused_and_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    file = tmp_path / "evil.pt"
    for value in (Program(mark), {"a": Program(mark), "b": torch.ones(2)}, [torch.ones(2), [Program(mark)]]):
        file.write_bytes(saved(value))
        with pytest.raises(
            CacheError, match=r"evil\.pt is refused: it holds more than tensors.*Nothing in it was executed"
        ):
            read_pt(file)
    assert not mark.exists()
    torch.load(file, weights_only=False)  # the file does what it says to those who let it
    assert mark.exists()


@pytest.mark.parametrize("value", [3, "text", None, {"a": 1}, {1: torch.ones(1)}, [torch.ones(1), "x"]], ids=repr)
def test_what_is_no_tensor_is_refused(value: object) -> None:
    with pytest.raises(CacheError, match=r"a\.pt is refused: it holds a .*; expected a tensor"):
        parse_pt(saved(value), "a.pt")
    with pytest.raises(CacheError, match="cannot be saved"):
        pt_bytes(value)  # type: ignore[arg-type]


def test_tensors_that_are_not_plain_are_refused() -> None:
    with pytest.raises(CacheError, match="no plain tensor"):
        parse_pt(saved(torch.eye(3).to_sparse()), "a.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordMissingError, match=r"nothing\.pt does not exist"):
        read_pt(tmp_path / "nothing.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(share: float) -> None:
    content = pt_bytes(TENSORS[0])
    with pytest.raises(RecordCorruptError, match=r"a\.pt is torn or damaged.*remove it and cache again"):
        parse_pt(content[: int(len(content) * share)], "a.pt")


def test_a_flipped_bit_in_the_tensor_is_noticed() -> None:
    """PyTorch's own reader returns the wrong tensor."""
    tensor = torch.arange(100.0)
    content = bytearray(pt_bytes(tensor))
    content[content.index(tensor.numpy().tobytes()) + 40] ^= 1
    assert not torch.equal(torch.load(io.BytesIO(content), weights_only=True), tensor)
    with pytest.raises(RecordCorruptError, match="Bad CRC-32"):
        parse_pt(bytes(content), "a.pt")


def test_a_compressed_archive_is_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pt_bytes(torch.zeros(100)))) as old, zipfile.ZipFile(stream, "w", 8) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(RecordCorruptError, match="compressed"):
        parse_pt(stream.getvalue(), "a.pt")


def test_the_format_of_old_pytorch_is_refused() -> None:
    stream = io.BytesIO()
    torch.save(torch.ones(2), stream, _use_new_zipfile_serialization=False)
    with pytest.raises(RecordCorruptError, match=r"PyTorch 1\.6 or later"):
        parse_pt(stream.getvalue(), "a.pt")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_fuzzed_bytes_give_the_tensor_or_an_error_of_ours(data: st.DataObject) -> None:
    tensor = TENSORS[0]
    content = bytearray(pt_bytes(tensor))
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "copy"]))
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "flip" and content:
            content[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            other = data.draw(st.integers(0, max(len(content) - 1, 0)))
            content[at : at + 8] = content[other : other + 8]
    try:
        found = parse_pt(bytes(content), "fuzzed.pt")
    except CacheError as error:
        assert "fuzzed.pt" in str(error)
    else:
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, tensor)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_random_pickles_inside_a_whole_archive(pickle: bytes, keep_head: bool) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pt_bytes(TENSORS[0]))) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            part = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                part = part[: len(part) // 2] + pickle if keep_head else pickle
            new.writestr(entry.filename, part)
    with pytest.raises(CacheError, match=r"fuzzed\.pt"):
        parse_pt(stream.getvalue(), "fuzzed.pt")


def test_the_malicious_file_is_refused_in_a_fresh_process(tmp_path: Path) -> None:
    """Whatever the environment says about unpickling."""
    mark, file = tmp_path / "executed", tmp_path / "evil.pt"
    file.write_bytes(saved(Program(mark)))
    code = (
        f"from dittocache.embeddings.foreign.pt_files import parse_pt; parse_pt(open({str(file)!r}, 'rb').read(), 'x')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert "is refused" in found.stderr
    assert not mark.exists()
