"""Safetensors files: as the reference library reads and writes them; and damaged in every way one can think of."""

import errno
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save, save_file

from koinon.core import UserError
from koinon.data.tensorfiles import DTYPES, Spec, TensorFile, TensorWriter


def example() -> dict[str, torch.Tensor]:
    """Every type of number; no element, one, and several; names that are odd."""
    numbers = torch.Generator().manual_seed(0)
    found = {
        word: torch.randint(0, 2, (3, 5), generator=numbers).to(dtype) if dtype == torch.bool
        else (torch.rand(3, 5, generator=numbers) * 100).to(dtype)
        for word, dtype in DTYPES.items()
    }  # fmt: skip
    return found | {
        "empty": torch.empty(0, 7),
        "none of it": torch.empty(0, dtype=torch.int64),
        "scalar": torch.tensor(2.5),
        "a.b/c λ 🎉": torch.arange(6.0).reshape(1, 2, 3),
        "": torch.ones(2),
    }


def whole(file: TensorFile, name: str) -> torch.Tensor:
    spec = file.specs[name]
    return file.read(name, 0, spec.count).reshape(spec.shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [its.contiguous().reshape(-1).view(torch.uint8).tolist() for its in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, which may be anything, and these bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_we_read_what_the_reference_writes(tmp_path):
    tensors = example()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "λ": "x"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "λ": "x"}
    assert file.specs.keys() == tensors.keys()
    for name, its in tensors.items():
        assert same(whole(file, name), its), name
    assert same(file.read("F32", 4, 9), tensors["F32"].flatten()[4:9])
    assert file.read("F32", 4, 4).shape == (0,)


@pytest.mark.parametrize("shard", [1, 100, 10**9])
def test_the_reference_reads_what_we_write(tmp_path, shard):
    """Written in pieces, the last tensor first; in one file or in many, with an index."""
    tensors = example()
    specs = {name: Spec(tuple(its.shape), its.dtype) for name, its in tensors.items()}
    writer = TensorWriter(tmp_path, specs, shard)
    for name, its in reversed(tensors.items()):
        for start in reversed(range(0, its.numel(), 4)):
            writer.write(name, start, its.flatten()[start : start + 4])
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {}
    for file in files:
        found |= load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        length = struct.unpack("<Q", file.read_bytes()[:8])[0]
        assert length % 8 == 0  # so that the first tensor is aligned
    assert found.keys() == tensors.keys()
    assert all(same(found[name], its) for name, its in tensors.items())
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        told = json.loads(index.read_text())
        assert told["weight_map"].keys() == tensors.keys()
        assert set(told["weight_map"].values()) == {file.name for file in files}
        assert told["metadata"]["total_size"] == sum(spec.size for spec in specs.values())


def test_offsets_need_not_be_aligned(tmp_path):
    """A float32 behind one byte; the reference reads it too."""
    values = torch.tensor([1.5, -2.0])
    header = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    path = raw(tmp_path / "a", header, b"\x07" + bytes(values.view(torch.uint8).tolist()))
    file = TensorFile(path)
    assert list(file.specs) == ["a", "b"]  # as they are stored
    assert same(whole(file, "b"), values)
    assert same(load_file(path)["b"], values)
    assert float(whole(file, "b").sum()) == -0.5


def test_what_is_read_can_be_written_to_without_reaching_the_file(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    TensorFile(tmp_path / "a").read("a", 0, 4).fill_(7)
    assert (tmp_path / "a").read_bytes() == before


def test_a_file_larger_than_memory_can_be_read(tmp_path):
    """A file of 4 TB with a hole in it: reading claims no memory."""
    count = 1 << 40
    path = raw(tmp_path / "a", {"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}})
    os.truncate(path, path.stat().st_size + 4 * count)
    file = TensorFile(path)
    assert file.read("a", count - 3, count).tolist() == [0.0, 0.0, 0.0]


def test_a_file_that_is_cut_meanwhile_is_told(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "a")
    file = TensorFile(tmp_path / "a")
    os.truncate(tmp_path / "a", (tmp_path / "a").stat().st_size - 4)
    assert file.read("a", 0, 3).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="has become shorter"):
        file.read("a", 0, 4)


def test_a_disk_that_cannot_reserve_room_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    writer = TensorWriter(tmp_path, {"a": Spec((2,), torch.float32)}, 10)
    writer.write("a", 0, torch.tensor([1.0, 2.0]))
    writer.finish()
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, 2.0]


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the disk has"):
        TensorWriter(tmp_path, {"a": Spec((1 << 50,), torch.float32)}, 10)
    assert list(tmp_path.iterdir()) == []

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match="No space left"):
        TensorWriter(tmp_path, {"a": Spec((2,), torch.float32)}, 10)


# Headers, each wrong in one way.

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = bytes(8)
WRONG = {
    "a list": ([1], EIGHT, "no object"),
    "a word": ("abc", b"", "no object"),
    "no JSON": (b"{", b"", "Expecting"),
    "more behind it": (b'{"__metadata__": {}} {}', b"", "Extra data"),
    "not UTF-8": (b'{"\xff": 1}', b"", "utf-8"),
    "half a character": (
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        EIGHT,
        "surrogates not allowed",
    ),
    "nested": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b"", "nested too deeply"),
    "nested lists": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "nested too deeply"),
    "a huge number": (
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 8]}}',
        EIGHT,
        "digit",
    ),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', EIGHT, "NaN"),
    "NaN beside": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": Infinity}}', EIGHT, "Infinity"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
        "twice",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "metadata"),
    "metadata of a list": ({"__metadata__": ["a"]}, b"", "metadata"),
    "an entry that is a list": ({"a": [1]}, b"", "unknown kind"),
    "an entry that is nothing": ({"a": None}, b"", "unknown kind"),
    "no kind": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT, "unknown kind None"),
    "an unknown kind": ({"a": ENTRY | {"dtype": "F31"}}, EIGHT, "unknown kind 'F31'"),
    "a kind that is a list": ({"a": ENTRY | {"dtype": ["F32"]}}, EIGHT, "unknown kind"),
    "a kind that is a mapping": ({"a": ENTRY | {"dtype": {}}}, EIGHT, "unknown kind"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT, "no valid shape"),
    "no place": ({"a": {"dtype": "F32", "shape": [2]}}, EIGHT, "no valid shape or place"),
    "a shape that is a number": ({"a": ENTRY | {"shape": 2}}, EIGHT, "no valid shape"),
    "a negative shape": ({"a": ENTRY | {"shape": [-2]}}, EIGHT, "no valid shape"),
    "two negative sizes": ({"a": ENTRY | {"shape": [-2, -1]}}, EIGHT, "no valid shape"),
    "half a size": ({"a": ENTRY | {"shape": [2.0]}}, EIGHT, "no valid shape"),
    "a size that is true": ({"a": ENTRY | {"shape": [2, True]}}, EIGHT, "no valid shape"),
    "a size of text": ({"a": ENTRY | {"shape": ["2"]}}, EIGHT, "no valid shape"),
    "a huge size": ({"a": ENTRY | {"shape": [2**63]}}, EIGHT, "no valid shape"),
    "sizes that overflow": ({"a": ENTRY | {"shape": [2**32, 2**32]}}, EIGHT, "fits into no file"),
    "65 dimensions": ({"a": ENTRY | {"shape": [1] * 64 + [2]}}, EIGHT, "no valid shape"),
    "negative offsets": ({"a": ENTRY | {"data_offsets": [-8, 0]}}, EIGHT, "place"),
    "turned offsets": ({"a": ENTRY | {"data_offsets": [8, 0]}}, EIGHT, "has -8 bytes"),
    "one offset": ({"a": ENTRY | {"data_offsets": [0]}}, EIGHT, "place"),
    "three offsets": ({"a": ENTRY | {"data_offsets": [0, 8, 8]}}, EIGHT, "place"),
    "another size": ({"a": ENTRY | {"shape": [3]}}, EIGHT, "has 8 bytes, its shape asks for 12"),
    "behind the end": ({"a": ENTRY | {"data_offsets": [8, 16]}}, EIGHT, "starts at 8"),
    "overlapping": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, EIGHT + bytes(4), "'b' starts at 4"),
    "the same place": ({"a": ENTRY, "b": ENTRY}, EIGHT, "'b' starts at 0"),
    "a gap": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, bytes(20), "'b' starts at 12"),
    "bytes too few": ({"a": ENTRY}, EIGHT[:-1], "there are 7: truncated?"),
    "bytes too many": ({"a": ENTRY}, bytes(9), "there are 9"),
    "a long name": ({"n" * 10**6: ENTRY | {"dtype": "X"}}, EIGHT, "unknown kind"),
}


@pytest.mark.parametrize(("header", "data", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_header_is_told(tmp_path, header, data, says):
    path = raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(UserError) as error:
        TensorFile(path)
    said = str(error.value)
    assert said.startswith(f"{path}: damaged, or not a safetensors file (")
    assert says in said
    assert len(said) < 400


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(7), bytes(8), b"PK\x03\x04" * 9, b"{}" * 20], ids=repr)
def test_what_is_no_such_file_is_told(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="damaged, or not a safetensors file"):
        TensorFile(tmp_path / "a")


@pytest.mark.parametrize("length", [0, 1, 10**4, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_told(tmp_path, length):
    with pytest.raises(UserError, match="header"):
        TensorFile(raw(tmp_path / "a", {"a": ENTRY}, EIGHT, length))


def test_a_file_that_is_not_there_or_a_folder_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="cannot be read"):
            TensorFile(path)


# Mutations.

DIFFERENT = {
    "a name twice": "the reference takes the last of two entries; which one is meant nobody knows",
    "65 dimensions": "torch itself has at most 64",
    "half a character": "JSON's escape for it is let through by Python's reader only, so it is refused apart",
}
"""Headers that one of the two readers may take and the other not, with the reason."""


@pytest.mark.parametrize("name", WRONG)
def test_what_we_refuse_the_reference_refuses(tmp_path, name):
    header, data, _ = WRONG[name]
    path = raw(tmp_path / "a", header, data)
    try:
        with safetensors.safe_open(path, "pt") as opened:
            taken = all(opened.get_tensor(name) is not None for name in opened.keys())  # noqa: SIM118
    except Exception:
        taken = False
    assert not taken or name in DIFFERENT, "the reference reads it"


FUZZ = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from koinon.core import UserError
from koinon.data.tensorfiles import TensorFile
import test_tensorfiles as made

def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

room = address_space() + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
path = Path({path!r})
good = made.good()
read = refused = 0
for number in range({first}, {last}):
    path.unlink(missing_ok=True)  # a new file: one that is mapped must not shrink
    path.write_bytes(made.mutated(good, number))
    try:
        file = TensorFile(path)
        for name, spec in file.specs.items():
            assert file.read(name, 0, spec.count).numel() == spec.count
        read += 1
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1000, str(error)[:2000]
        refused += 1
print(read, refused)
"""


def good() -> bytes:
    return save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3, dtype=torch.int8), "c": torch.empty(0, 2)})


NUMBERS = ["-1", "0", "1", "2", "8", "1e3", "2.0", "null", "true", '"x"', "[]", "{}", "NaN", "-Infinity", "-0",
           str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(2**64), str(-(2**63)), "9" * 5000]  # fmt: skip


def mutated(content: bytes, number: int) -> bytes:
    """The file damaged in one of many ways, or in several."""
    chance = random.Random(number)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        length = struct.unpack("<Q", content[:8].ljust(8, b"\0"))[0]
        end = 8 + min(length, len(content))
        header, data = content[8:end], content[end:]
        at = chance.randrange(max(len(content), 1))
        match chance.randrange(12):
            case 0:  # a bit
                content = (
                    content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
                    if content
                    else b"x"
                )
            case 1:  # a byte of the header
                at = chance.randrange(8 + min(len(header), 250))
                content = content[:at] + chance.randbytes(1) + content[at + 1 :]
            case 2:
                content = content[:at]
            case 3:
                content += chance.randbytes(chance.randrange(1, 50))
            case 4:  # the length of the header
                wrong = chance.choice(
                    (0, 1, length + 1, max(length - 1, 0), len(content), 10**8, 2**31, 2**63, 2**64 - 1)
                )
                content = struct.pack("<Q", wrong % 2**64) + content[8:]
            case 5:  # a number or word of the header
                words = header.decode("utf-8", "replace")
                places = [i for i, char in enumerate(words) if char.isdigit()] or [0]
                at = chance.choice(places)
                words = words[:at] + chance.choice(NUMBERS) + words[at + 1 :]
                content = struct.pack("<Q", len(words.encode())) + words.encode() + data
            case 6:  # nesting
                inside = chance.choice((b"[", b'{"a":')) * chance.choice((10, 1000, 100_000))
                header = header.replace(b"[", inside, 1)
                content = struct.pack("<Q", len(header)) + header + data
            case 7:  # an entry again
                header = header[:-1].rstrip(b" }") + b"}," + header.lstrip(b" {")
                content = struct.pack("<Q", len(header)) + header + data
            case 8:  # a key
                old, new = chance.choice(((b"dtype", b"type"), (b"shape", b"shap"), (b"data_", b""), (b'"a"', b'"b"')))
                header = header.replace(old, new, 1)
                content = struct.pack("<Q", len(header)) + header + data
            case 9:  # text that is none
                odd = (b"\xff", b"\\ud800", b"\\u0000", b"a" * 99_999, b"\xed\xa0\x80")
                header = header.replace(b'"a"', b'"' + chance.choice(odd) + b'"', 1)
                content = struct.pack("<Q", len(header)) + header + data
            case 10:  # a shape of many
                size = chance.choice((b"1", b"0", b"9223372036854775807"))
                header = header.replace(
                    b"[2,3]", b"[" + b",".join([size] * chance.choice((3, 64, 65, 50_000))) + b"]", 1
                )
                content = struct.pack("<Q", len(header)) + header + data
            case 11:  # stretches moved
                other = chance.randrange(max(len(content), 1))
                low, high = sorted((at, other))
                content = content[:low] + content[high:] + content[low:high]
    return content


def test_damaged_files_are_refused_or_read(tmp_path):
    """2,000 of them, in 300 MB: never another exception, a hang or a huge allocation."""
    program = FUZZ.format(tests=str(Path(__file__).parent), path=str(tmp_path / "a.safetensors"), first=0, last=2000)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused = map(int, done.stdout.split())
    assert read + refused == 2000
    assert read > 50  # as where a bit of a number is another
    assert refused > 1000


def test_what_we_read_of_damaged_files_the_reference_reads_too(tmp_path):
    """And the other way round, but for what has a reason."""
    differ = []
    path = tmp_path / "a"
    for number in range(200):
        content = mutated(good(), number)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        try:
            ours = {name: (spec.shape, str(spec.dtype)) for name, spec in TensorFile(path).specs.items()}
        except UserError as error:
            ours = str(error).partition("(")[2]
        try:
            with safetensors.safe_open(path, "pt") as opened:
                theirs = {
                    name: (tuple(opened.get_slice(name).get_shape()), str(opened.get_tensor(name).dtype))
                    for name in opened.keys()  # noqa: SIM118
                }
        except Exception as error:
            theirs = str(error)
        both_refuse = isinstance(ours, str) and isinstance(theirs, str)
        if ours != theirs and not both_refuse and ours != "its header names something twice)":  # see DIFFERENT
            differ.append((number, ours, theirs))
    assert differ == []
