"""How models on disk are merged, whatever the method: what a person can choose, and what would be done."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from koinon.core import UserError
from koinon.data.checkpoints import Loaded
from koinon.data.tensorfiles import DTYPES
from koinon.merge._contract import Blend, Merge
from koinon.merge._engine import CHUNK, Part, Sources, cores
from koinon.merge._files import refuse_out, run
from koinon.merge._plan import Plan, plan
from koinon.terminal import Told, keeping

KINDS: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point
}
MINIMUM = 1_000_000
"""Bytes in one file of a result, at the least allowed limit."""


@dataclass(frozen=True)
class How:
    """How models on disk are merged, whatever the method."""

    only: tuple[str, ...] = ()
    """Patterns of the tensors to merge, such as 'model.layers.*'; the others are the base's. All by default."""
    rounding: Literal["once", "every-step"] = "once"
    """Compute in float32 and round once; or round to the written type after every operation, as mergekit does."""
    missing: bool = False
    """Take a tensor that a model lacks for unchanged."""
    allow_nonfinite: bool = False
    """Merge NaN and infinity as they are."""
    trust_pickle: bool = False
    """Read pickled weights as well: their tensors, never code in them."""
    workers: int = 0
    """Threads; 0 for as many as there are cores."""
    shard_gb: float = 5.0
    """Most gigabytes in one file of the result."""
    dry_run: bool = False
    """Only tell what would be read, written and needed."""

    def plan(self, base: Path | None, experts: Sequence[Path], dtype: str | None, own: Sequence[str] = ()) -> Plan:
        """See `plan`."""
        return plan(base, experts, self.only, KINDS.get(dtype or ""), self.missing, self.trust_pickle, own)

    def refuse_streaming(self, method: Merge) -> None:
        """Raise UserError for an option of methods that stream, given to one that loads whole models."""
        plain = vars(How(dry_run=self.dry_run))
        for option, value in vars(self).items():
            if value != plain[option]:
                word, name = option.replace("_", "-"), type(method).__name__
                raise UserError(f"--{word}: {name} loads whole models to look at data with them; leave it out")

    def stream(
        self, found: Plan, method_for: Callable[[str], Blend], out: Path, told: Told, rounding: str | None = None
    ) -> dict[str, Any]:
        """Carry out a plan, or describe it; ``rounding`` is the type to round to if it is not the written one."""
        if self.workers < 0 or not MINIMUM <= self.shard_gb * 1e9 < 2**63:
            raise UserError("--workers takes a number from 0, --shard-gb one from 0.001")
        if found.base is None and any(method_for(name).needs_base for name in found.merged):
            raise UserError("this method works on differences to a base: give it with --base")
        for method in found.methods(method_for).values():
            _try(method, tuple(found.tuned))
        workers = self.workers or cores()
        kinds = {KINDS[rounding]} if rounding else {found.out[name].dtype for name in found.merged}
        if self.rounding == "every-step" and len(kinds) > 1:
            raise UserError("--rounding every-step rounds to one type and the models hold several: give --dtype")
        facts = _facts(found, method_for, out, workers)
        if self.dry_run:
            refuse_out(out, found.inputs)
            return facts
        kind = kinds.pop() if self.rounding == "every-step" else None
        with keeping():
            run(found, method_for, out, kind, workers, int(self.shard_gb * 1e9), self.allow_nonfinite, told)
        return facts


def _try(method: Blend, models: Sequence[str]) -> None:
    """Merge a tensor of two numbers, so that settings that cannot be are refused before anything is read."""
    held = {model: Loaded({"tensor": torch.tensor([1.0, 2.0])}) for model in models}
    sources = Sources(Loaded({"tensor": torch.zeros(2)}), held)
    method.blend(sources.chunk("tensor", 0), method.measure(Part(sources, ["tensor"])))


def _facts(found: Plan, method_for: Callable[[str], Blend], out: Path, workers: int) -> dict[str, Any]:
    methods = found.methods(method_for)
    words, kinds = list(methods), list(methods.values())
    models = len(found.tuned) + 1
    # As measured with TIES on 3 to 9 models, which takes the most; benchmarks/merge/README.md.
    room = workers * (6 * models + 24) * CHUNK * 4
    facts = {
        "out": str(out),
        "method": ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else ""),
        "models": {name: str(path) for name, path in found.paths.items()},
        "base": str(found.base_path) if found.base_path else "none",
        "tensors": {"merged": len(found.merged), "copied": len(found.copied)},
        "bytes": {"read": found.reads(method_for), "written": found.writes},
        "passes over all files": max(its.passes for its in kinds),
        "memory": f"at most about {room / 1e6:.0f} MB beside Python and torch, for {workers} workers",
    }
    return facts | ({"notes": {str(i): note for i, note in enumerate(found.notes, 1)}} if found.notes else {})
