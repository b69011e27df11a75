"""Merging models on disk: streamed tensor by tensor into a folder that appears whole or not at all."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from koinon.core import UserError
from koinon.data.checkpoints import Adapted, read_json
from koinon.data.outputs import refuse_read, refuse_taken
from koinon.data.tensorfiles import TensorWriter, Weights
from koinon.merge._contract import Blend
from koinon.merge._engine import CHUNK, Chunk, Sources, as_bytes, blend_all, measure_all, tree
from koinon.merge._plan import Plan
from koinon.terminal import Told, untold

FORMAT = 1
"""Version of the manifest ``koinon.json``."""
CARRIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "*.tiktoken")
"""What is carried over beside the weights: configuration, tokenizer, licence."""
LEFT = ("*.index.json", "adapter_config.json", "trainer_state.json", "koinon.json")
"""What is not, though it matches."""


def run(
    plan: Plan,
    method_for: Callable[[str], Blend],
    out: Path,
    rounding: torch.dtype | None = None,
    workers: int = 2,
    shard: int = 5 * 10**9,
    allow_nonfinite: bool = False,
    told: Told = untold,
) -> dict[str, Any]:
    """Stream the merge into ``out``; gives the manifest, which is kept as ``koinon.json`` beside the weights.

    A run that is stopped leaves a hidden folder beside ``out``; the same merge started again goes on from there.

    Raises:
        UserError: ``out`` is taken, the disk is full, or a number is NaN or infinite; nothing is left behind then.
    """
    refuse_out(out, plan.inputs)
    _keep_freed()
    out = out.resolve()
    config = _config(plan)
    methods = plan.methods(method_for)
    settings = {
        "format": FORMAT,
        "koinon": metadata.version("koinon"),
        "methods": sorted(methods),
        "by tensor": hashlib.sha256("\n".join(repr(method_for(n)) for n in plan.merged).encode()).hexdigest(),
        "files": [_state(path) for path in plan.inputs],
        "out": {name: [list(spec.shape), str(spec.dtype)] for name, spec in plan.out.items()},
        "merged": list(plan.merged),
        "rounding": "once" if rounding is None else str(rounding).removeprefix("torch."),
        "shard": shard,
        "allow_nonfinite": allow_nonfinite,
    }
    with _Unfinished(out, settings) as work:
        sources = Sources(
            plan.base if plan.reads_base(methods.values()) else None, plan.tuned, rounding, allow_nonfinite, plan.tied
        )
        kept = "" if plan.base is not None else next(iter(plan.tuned))
        rest = Sources(None, {kept: plan.reference}, allow_nonfinite=allow_nonfinite)
        writer = TensorWriter(work.folder, plan.out, shard, fresh=work.fresh)
        work.ready()
        tally = _Tally(writer, plan.writes, sum(plan.out[name].size for name in work.done), told)

        def left(names: Sequence[str]) -> list[str]:
            return [name for name in names if name not in work.done]

        try:
            measured = {
                word: measure_all(method, sources, plan.merged, workers)
                for word, method in methods.items()
                if method.measures_whole and left(plan.merged)
            }
            blend_all(method_for, sources, left(plan.merged), plan.out, tally.write, work.keep,
                      workers, digest=True, measured=measured)  # fmt: skip
            blend_all(
                lambda name: _Unchanged(), rest, left(plan.copied), plan.out, tally.write, work.keep, workers, True
            )
            writer.finish()
        finally:
            writer.abandon()
        carry(plan.reference_path, work.folder)
        if config is not None:
            (work.folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        manifest = _manifest(plan, settings, work.done)
        (work.folder / "koinon.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        work.finish()
    return manifest


def _keep_freed() -> None:
    """Have memory that a chunk frees be there for the next one; given back, it would be cleared page by page anew."""
    trim, mapped = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(trim, 32 * CHUNK)  # of float32, 4 bytes each
        library.mallopt(mapped, 6 * CHUNK)


@dataclass(frozen=True)
class _Unchanged(Blend):
    """What is copied: any kind of numbers, to the bit."""

    needs_base: ClassVar = False

    def blend(self, chunk: Chunk, found: Any) -> Tensor:
        """See `Blend.blend`."""
        (numbers,) = chunk.tuned.values()
        return numbers


class _Tally:
    """Counts what is written."""

    def __init__(self, writer: TensorWriter, total: int, done: int, told: Told):
        self.writer, self.total, self.done, self.told = writer, total, done, told
        self.lock = threading.Lock()
        told(done, total)

    def write(self, name: str, start: int, values: Tensor) -> None:
        self.writer.write(name, start, values)
        with self.lock:
            self.done += values.numel() * values.element_size()
            self.told(self.done, self.total)


class _Unfinished:
    """The hidden folder beside ``out`` in which a merge grows, with a journal of the tensors that are whole."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out = out
        self.folder = out.parent / f".{out.name}.merging"
        self.settings = json.dumps({**settings, "system": _started()})
        self.done: dict[str, Mapping[str, str]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> "_Unfinished":
        # Those that are made here, the deepest first: a merge that fails takes them away.
        self.made = [its for its in self.folder.parents if not its.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.held = os.open(self.folder, os.O_RDONLY)
            _lock(self.held, self.out)
            kept = self.folder / "plan.json"
            self.fresh = not (kept.is_file() and kept.read_bytes() == self.settings.encode())
            if self.fresh:
                kept.unlink(missing_ok=True)  # first: with it, what is left would be gone on with
                for file in self.folder.iterdir():
                    file.unlink()
            self.journal = (self.folder / "journal.jsonl").open("a+", encoding="utf-8")
            self.journal.seek(0)
            for line in self.journal:
                with contextlib.suppress(ValueError):  # the last line may be cut
                    self.done |= json.loads(line)
            self.journal.write("\n")
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror})") from None
        return self

    def ready(self) -> None:
        """The files are made: what follows can be gone on with."""
        if self.fresh:
            (self.folder / "plan.json").write_text(self.settings, encoding="utf-8")

    def keep(self, name: str, digests: Mapping[str | None, str]) -> None:
        """A tensor is whole."""
        held = {model or "": digest for model, digest in digests.items()}
        with self.lock:
            self.done[name] = held
            self.journal.write(json.dumps({name: held}) + "\n")
            self.journal.flush()

    def finish(self) -> None:
        self.journal.close()
        for name in ("journal.jsonl", "plan.json"):
            (self.folder / name).unlink()
        os.replace(self.folder, self.out)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(OSError):  # of a full disk
            self.journal.close()
        if kind is not None and issubclass(kind, Exception):  # a stop from outside leaves what is finished
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else is in it meanwhile
                for its in self.made:
                    its.rmdir()
        os.close(self.held)
        if isinstance(error, OSError):
            raise UserError(f"{self.out}: cannot be written ({error.strerror or error})") from None


def _started() -> str:
    """Another after each start of the system: what the journal calls whole may not have outlived a power cut."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""  # another system


def _lock(folder: int, out: Path) -> None:
    """Hold the folder while this process lives."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not on this system
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(folder)
        raise UserError(f"{out}: another process is merging into it") from None


def refuse_out(out: Path, inputs: Sequence[Path]) -> None:
    """Raise UserError if the folder exists with something in it, cannot be made, or is an input or within one."""
    refuse_read([out], inputs)
    refuse_taken(out, empty=True)


def _state(path: Path) -> list[Any]:
    """What changes if a model's files change, or others take their place."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return [str(path.resolve()), found]


def _config(plan: Plan) -> dict[str, Any] | None:
    """The reference's ``config.json``, with the type of the numbers if it changed."""
    file = plan.reference_path / "config.json"
    if not file.is_file():
        return None
    settings = read_json(file)
    kinds = {str(spec.dtype).removeprefix("torch.") for spec in plan.out.values() if spec.dtype.is_floating_point}
    for key in ("dtype", "torch_dtype"):
        if key in settings and len(kinds) == 1:
            settings[key] = next(iter(kinds))
    return settings


def carry(path: Path, folder: Path, leave: Sequence[str] = ()) -> None:
    """Copy a model's configuration, tokenizer and licence into a folder, but for the files to leave."""
    for pattern in CARRIED if path.is_dir() else ():
        for file in path.glob(pattern):
            if file.is_file() and not any(file.match(left) for left in (*LEFT, *leave)):
                shutil.copyfile(file, folder / file.name)


def digest_of(weights: Weights) -> str:
    """One digest of all tensors, as that of a model of which all are streamed."""
    found = {}
    for name, spec in weights.specs.items():
        if not spec.count:
            continue
        starts = enumerate(range(0, spec.count, CHUNK))
        read = ((number, weights.read(name, start, min(start + CHUNK, spec.count))) for number, start in starts)
        found[name] = tree({number: hashlib.sha256(as_bytes(values)).digest() for number, values in read})
    return _whole_digest(found)


def _whole_digest(tensors: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {its}" for name, its in sorted(tensors.items())).encode()).hexdigest()


def _manifest(plan: Plan, settings: Mapping[str, Any], done: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What was made of what."""

    def model(key: str, path: Path, weights: Weights) -> dict[str, Any]:
        if isinstance(weights, Adapted):
            return {"path": str(path), "adapter sha256": weights.sha256, "its config sha256": weights.config_sha256}
        parts = {name: its[key] for name, its in done.items() if key in its}
        if not parts:  # nothing of it was read: it gives the names, the configuration and the tokenizer
            return {"path": str(path)}
        return {"path": str(path), "tensors sha256": _whole_digest(parts)}

    found = {
        "format": FORMAT,
        "koinon": metadata.version("koinon"),
        "methods": settings["methods"],
        "models": {name: model(name, path, plan.tuned[name]) for name, path in plan.paths.items()},
        "merged": len(plan.merged),
        "copied": len(plan.copied),
        "rounding": settings["rounding"],
        "chunk": CHUNK,
    }
    if plan.base is not None and plan.base_path is not None:
        found["base"] = model("", plan.base_path, plan.base)
    return found
