"""What the two compute from one recipe: element by element in the results, in steps between bfloat16 numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from contestants import files
from safetensors import safe_open
from torch import Tensor


class Folder:
    """A model's tensors by name, read one at a time."""

    def __init__(self, path: Path):
        self._files = [safe_open(file, "pt") for file in files([path])]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)


def steps(ours: Tensor, theirs: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between the two; 0 if equal, also for 0 and -0."""
    return (_place(ours) - _place(theirs)).abs()


def _place(values: Tensor) -> Tensor:
    bits = values.to(torch.bfloat16).contiguous().view(torch.int16).int()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


def pairs(ours: Path, theirs: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each tensor of both results.

    Raises:
        SystemExit: they do not have the same tensors.
    """
    one, other = Folder(ours), Folder(theirs)
    if one.names() != other.names():
        raise SystemExit(f"{ours} and {theirs} have different tensors: {set(one.names()) ^ set(other.names())}")
    for name in one.names():
        yield name, one[name], other[name]


def compare(ours: Path, theirs: Path) -> list[str]:
    """Elements, how many differ, how many by more than one step, and the largest difference over the tensor's RMS.

    Near 0 the steps are tiny, so that a sum that nearly cancels is many of them off and yet close: hence the last.
    """
    total = differ = further = 0
    largest = 0.0
    for _, one, other in pairs(ours, theirs):
        apart = steps(one, other)
        total += apart.numel()
        differ += int((apart > 0).sum())
        further += int((apart > 1).sum())
        scale = float(other.float().square().mean().sqrt()) or 1.0
        largest = max(largest, float((one.float() - other.float()).abs().max()) / scale)
    return [f"{total:,}", f"{differ:,} ({differ / total:.2%})", f"{further:,}", f"{largest:.1e}"]


def compare_trimmed(ours: Path, theirs: Path, inputs: Sequence[Path], density: float) -> list[str]:
    """As `compare`, apart for elements that are, in some model, as large as the smallest that is kept.

    Of those mergekit keeps as many as the density asks for, whichever its sort puts first; koinon keeps them all.
    """
    base, *tuned = (Folder(path) for path in inputs)
    total = tied = differ = differ_tied = 0
    for name, one, other in pairs(ours, theirs):
        at_edge = torch.zeros(one.shape, dtype=torch.bool)
        for model in tuned:
            sizes = (model[name] - base[name]).abs().float()
            count = max(1, int(density * sizes.numel()))
            cut = sizes.flatten().kthvalue(sizes.numel() - count + 1).values
            if int((sizes >= cut).sum()) > count:
                at_edge |= sizes == cut
        apart = steps(one, other) > 0
        total += apart.numel()
        tied += int(at_edge.sum())
        differ += int((apart & ~at_edge).sum())
        differ_tied += int((apart & at_edge).sum())
    return [f"{total:,}", f"{tied:,} ({tied / total:.2%})", f"{differ:,}", f"{differ_tied:,}"]


def dropped(out: Path, base: Path, tuned: Path, weight: float) -> list[str]:
    """Of what the model changed, the share that is left, and the mean size of what is left against that of all."""
    result, start, end = Folder(out), Folder(base), Folder(tuned)
    changed = left = 0
    before = after = 0.0
    for name in result.names():
        delta = end[name].float() - start[name].float()
        change = (result[name].float() - start[name].float()) / weight
        changed += int((delta != 0).sum())
        left += int((change != 0).sum())
        before += float(delta.abs().sum(dtype=torch.float64))
        after += float(change.abs().sum(dtype=torch.float64))
    return [f"{left / changed:.2%}", f"{after / before:.4f}"]
