"""Side branches: rows of one batch run through a module with weights of their own, without building these weights.

Where a leaf m is affine in its tensors, m(x; theta + sum_t w_t v_t) = m(x; theta) + sum_t w_t (m(x; v_t) - m(x; 0)).
For a linear leaf and low-rank v_t = L_t R_t the sum costs two narrow products for all models and rows at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from koinon.core import UserError
from koinon.nn.lowrank import Stack, beside

At = Callable[[Mapping[str, Tensor]], Tensor]
"""What a leaf says of its input with other tensors in the place of its own."""


class Branches(nn.Module):
    """What several models add to the tensors of one module, applied row by row while the module runs.

    Every submodule that itself holds one of the tensors is a leaf here, also if it has children.

    Args:
        module: whose tensors the stacks add to; it is looked at, not kept.
        stacks: name in ``module.state_dict()`` to what each model adds; of tied tensors either name will do.
    """

    def __init__(self, module: nn.Module, stacks: Mapping[str, Stack]):
        super().__init__()
        self.stacks = nn.ModuleDict({_key(name): stack for name, stack in stacks.items()})
        tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
        name_of = {id(tensors[name]): name for name in stacks}
        self.places: dict[str, dict[str, str]] = {}
        """Path of a leaf to its tensors' names there and in ``stacks``."""
        self.moving: set[str] = set()
        """Paths of leaves with a buffer among these tensors, such as running statistics."""
        for path, leaf in module.named_modules():
            parameters = dict(leaf.named_parameters(recurse=False))
            for local, tensor in (parameters | dict(leaf.named_buffers(recurse=False))).items():
                if id(tensor) in name_of:
                    self.places.setdefault(path, {})[local] = name_of[id(tensor)]
                    if local not in parameters:
                        self.moving.add(path)
        self.met: set[str] = set()
        """Paths of leaves that were called, and found to be affine."""

    def mixed(self, module: nn.Module, weights: Float[Tensor, " model"]) -> dict[str, Tensor]:
        """The tensors of the module that change, at theta + sum_t w_t v_t."""
        held = module.state_dict()
        names = {name for its in self.places.values() for name in its.values()}
        return {name: held[name] + self._stack(name).mixed(weights).to(held[name]) for name in sorted(names)}

    @contextlib.contextmanager
    def mixing(self, module: nn.Module, weights: Float[Tensor, "batch model"]) -> Iterator[None]:
        """While this lasts, each row that runs through the module meets theta + sum_t w_t v_t with its own weights.

        Args:
            module: a module like the one the branches were made for, in evaluation mode.
            weights: one row for each row of the batches that run.

        Raises:
            UserError: from within, at a leaf that is not affine in its tensors, whose output is no tensor, or whose
                input has another number of rows than the weights (one row, which is broadcast, may be for all).
        """
        handles = []
        try:
            for path in self.places:
                hook = partial(self._add, path, weights)
                handles.append(module.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _stack(self, name: str) -> Stack:
        stack = self.stacks[_key(name)]
        assert isinstance(stack, Stack)
        return stack

    def _add(self, path: str, weights: Tensor, leaf: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        """The hook of one leaf."""
        stacks = {local: self._stack(name) for local, name in self.places[path].items()}
        refused = partial(_refused, path, list(self.places[path].values()))
        if not isinstance(output, Tensor):
            raise refused("its output is no tensor")
        given = [value for value in (*args, *kwargs.values(), output) if isinstance(value, Tensor)]
        found = {len(value) if value.ndim else 0 for value in given}
        if not found <= {1, len(weights)}:
            raise refused(f"it runs with {sorted(found)} rows in a batch of {len(weights)}")
        weights, x = weights.to(output), next(iter((*args, *kwargs.values())), output)
        held = {local: getattr(leaf, local) for local in stacks}
        if path in self.moving:
            self.met.add(path)
            its = {local: held[local] + stack.rows(weights) for local, stack in stacks.items()}
            try:
                return _each_row(leaf, x.expand(len(weights), *x.shape[1:]), its)
            except RuntimeError as error:
                raise refused("it has a buffer among its tensors and cannot run one row at a time") from error
        at: At = partial(_run, _Bare(leaf), args, kwargs)
        if path not in self.met and len(weights):
            if not _affine(at, held, stacks):
                raise refused(f"its output is not affine in its {' and '.join(stacks)}")
            self.met.add(path)
        linear = type(leaf).forward is nn.Linear.forward and ("weight" not in stacks or stacks["weight"].factored)
        return output + (_narrow(x, weights, stacks) if linear else _wide(at, held, weights, stacks))


class _Bare(nn.Module):
    """A leaf without its hooks."""

    def __init__(self, leaf: nn.Module):
        super().__init__()
        self.leaf = leaf

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.leaf.forward(*args, **kwargs)


def _run(bare: _Bare, args: Any, kwargs: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    return functional_call(bare, {f"leaf.{name}": value for name, value in tensors.items()}, args, kwargs)


def _narrow(x: Float[Tensor, "batch ... width"], weights: Tensor, stacks: Mapping[str, Stack]) -> Tensor:
    """A linear leaf: sum_t w_t (L_t R_t x + b_t)."""
    weight, bias = stacks.get("weight"), stacks.get("bias")
    total = weight.product(x, weights) if weight else x.new_zeros(())
    return total + beside(weights @ bias.whole, x.ndim) if bias else total


def _wide(at: At, held: Mapping[str, Tensor], weights: Tensor, stacks: Mapping[str, Stack]) -> Tensor:
    """Any affine leaf: it runs once for every model that has a weight."""
    origin = at({name: torch.zeros_like(value) for name, value in held.items()})
    total = torch.zeros_like(origin)
    for model in weights.any(0).nonzero().flatten().tolist():
        change = at({name: stack.part(model) for name, stack in stacks.items()}) - origin
        total = total + weights[:, model].view(-1, *[1] * (change.ndim - 1)) * change
    return total


def _each_row(leaf: nn.Module, x: Tensor, tensors: dict[str, Float[Tensor, "batch ..."]]) -> Tensor:
    """A leaf with running statistics, in which it is not affine: it runs with each row's tensors, which are small."""

    def one(row: Tensor, its: Mapping[str, Tensor]) -> Tensor:
        return _run(_Bare(leaf), (row[None],), {}, its)[0]

    return vmap(one)(x, tensors)


def _affine(at: At, held: Mapping[str, Tensor], stacks: Mapping[str, Stack]) -> bool:
    """Whether m(a + b) + m(0) = m(a) + m(b), for the leaf's tensors a and a step b as long as they are."""
    step = {}
    for name, stack in stacks.items():
        models = len(next(stack.buffers()))
        way = stack.mixed(1 / torch.arange(1, models + 1)).to(held[name])
        length = way.norm()
        step[name] = way * ((held[name].norm() or 1) / length) if length > 0 else way
    both = at({name: held[name] + step[name] for name in held})
    origin = at({name: torch.zeros_like(value) for name, value in held.items()})
    values = torch.stack([both, origin, -at(held), -at(step)])
    limit = torch.finfo(values.dtype).eps ** 0.5 * values.abs().max()
    return bool(values.isfinite().all()) and bool(values.sum(0).abs().max() <= limit)


def _refused(path: str, names: Sequence[str], why: str) -> UserError:
    return UserError(f"{path or 'the model'}: {why}; put its tensors into `skip`: {', '.join(names)}")


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name has no dot
