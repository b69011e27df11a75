"""Merging live modules: what a pool's models share, and running a model with other weights."""

import copy
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import UserError
from koinon.data.checkpoints import Loaded, matches
from koinon.merge._engine import Sources, blend_all, cores, measure_all

if TYPE_CHECKING:
    from koinon.merge._contract import Blend, Pool

State = Mapping[str, Tensor]
"""Name to tensor."""


def shared_states(pool: "Pool") -> tuple[State, dict[str, State]]:
    """The tensors to merge, of the base and of each model: floating point, and none that stays a task's own.

    Raises:
        UserError: no model, a tensor that a model lacks or has in another shape, or one that holds NaN or infinity.
    """
    if not pool.tuned:
        raise UserError("no model to merge: give the pool at least one")
    base = _shared(pool)
    if not base:
        raise UserError("nothing to merge: every tensor of the base stays a task's own")
    tuned: dict[str, State] = {}
    for model, module in pool.tuned.items():
        state = module.state_dict()
        for name, value in base.items():
            if name not in state:
                raise UserError(f"model {model!r}: has no tensor {name}, which the base has")
            if state[name].shape != value.shape:
                shapes = " against ".join(str(list(its.shape)) for its in (state[name], value))
                raise UserError(f"model {model!r}: {name} is {shapes} in the base; name it in `own` if it is a head")
        extra = [name for name in state if name not in pool.base.state_dict() and not is_own(pool, name)]
        if extra:
            raise UserError(f"model {model!r}: has {extra[0]}, which the base lacks; name it in `own` if it is a head")
        tuned[model] = {name: state[name].detach() for name in base}
    for who, its in (("the base", base), *((f"model {model!r}", its) for model, its in tuned.items())):
        for name, value in its.items():
            if not bool(value.isfinite().all()):
                raise UserError(f"{who}: NaN or infinity in {name}; merge models without")
    return base, tuned


def _shared(pool: "Pool") -> State:
    """Of the base; see `shared_states`."""
    return {
        name: value.detach()
        for name, value in pool.base.state_dict().items()
        if value.is_floating_point() and not is_own(pool, name)
    }


def is_own(pool: "Pool", name: str) -> bool:
    """Whether a tensor stays each task's own."""
    return matches(name, pool.own)


def blended(method: "Blend", pool: "Pool") -> nn.Module:
    """A copy of the base with what a tensor-wise method makes of all the models."""
    base, tuned = shared_states(pool)
    sources = Sources(Loaded(base) if method.needs_base else None, {name: Loaded(its) for name, its in tuned.items()})
    names = list(base)
    merged = {name: torch.empty_like(value, device="cpu").flatten() for name, value in base.items()}

    def write(name: str, start: int, values: Tensor) -> None:
        merged[name][start : start + len(values)] = values

    workers = cores()
    found = {repr(method): measure_all(method, sources, names, workers)} if method.measures_whole else None
    specs = Loaded(base).specs
    blend_all(lambda name: method, sources, names, specs, write, workers=workers, measured=found)
    return with_weights(pool.base, {name: value.view(base[name].shape) for name, value in merged.items()})


def with_weights(module: nn.Module, state: State) -> nn.Module:
    """A copy of the module that holds these tensors."""
    result = copy.deepcopy(module)
    held = result.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            held[name].copy_(value)
    return result


def personal(pool: "Pool", merged: nn.Module, task: str) -> nn.Module:
    """The task's model with the merged tensors in the place of its own, except those that stay its own."""
    state = merged.state_dict()
    return with_weights(pool.tuned[task], {name: state[name] for name in _shared(pool)})


def outputs(module: nn.Module, inputs: Any, state: State | None = None) -> Float[Tensor, "batch ..."]:
    """What a model says of a batch, with other tensors in the place of its own if given.

    ``inputs`` is a tensor, or a mapping of tensors given by keyword; of a Hugging Face output the logits are taken.
    """
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    out = module(*args, **kwargs) if state is None else torch.func.functional_call(module, dict(state), args, kwargs)
    return out if isinstance(out, Tensor) else out.logits


def rows(inputs: Any) -> int:
    """How many rows the inputs have."""
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


def taken(inputs: Any, chosen: Any) -> Any:
    """Some of the rows: a slice or indices."""
    if isinstance(inputs, Mapping):
        return {name: value[chosen] for name, value in inputs.items()}
    return inputs[chosen]


def shuffled(inputs: Any, batch: int, generator: torch.Generator) -> Iterator[Any]:
    """Batches for ever, each pass in a new order; all of the rows if they are fewer than a batch."""
    count = rows(inputs)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, max(count - batch, 0) + 1, batch):
            yield taken(inputs, order[start : start + batch])


def needed(pool: "Pool", what: str) -> Mapping[str, Any]:
    """The pool's data for every model, in the models' order.

    Raises:
        UserError: a task without any.
    """
    for task in pool.tuned:
        if task not in pool.data or rows(pool.data[task]) == 0:
            raise UserError(f"model {task!r}: no data in the pool; {what} needs unlabelled inputs of every task")
    return {task: pool.data[task] for task in pool.tuned}


def quietly(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, whose parameters ask for no gradient."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def entropy(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    """Mean entropy of the predictions, in nats."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


Predict = Callable[[State, str, Any], Tensor]
"""From weights, task and batch to the task's logits."""


def parts(module: nn.Module, state: State) -> tuple[list[str], list[str]]:
    """The names in a state: parameters, one tied to another only once; then the rest, such as running means."""
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return [name for name, _ in module.named_parameters() if name in state], [
        name for name in state if name not in every
    ]


def tap(module: nn.Module, pattern: str) -> tuple[str, bool]:
    """Where features are read: the path of a submodule, and whether its input is meant rather than its output.

    Args:
        module: the model.
        pattern: as of ``fnmatch``, for the path; the last submodule that matches counts. ``":input"`` behind it
            asks for the input. Empty: the input of the last submodule without children that has parameters, the head.

    Raises:
        UserError: no submodule matches.
    """
    if not pattern:
        leaves = [path for path, its in module.named_modules() if list(its.parameters()) and not list(its.children())]
        return leaves[-1], True
    wanted = pattern.removesuffix(":input")
    paths = [path for path, _ in module.named_modules() if path and fnmatch.fnmatchcase(path, wanted)]
    if not paths:
        raise UserError(f"features: no module is called {wanted!r}; give a pattern of a path, as of named_modules()")
    return paths[-1], wanted != pattern


@torch.no_grad()
def features(module: nn.Module, pattern: str, inputs: Any, size: int = 256) -> Float[Tensor, "batch width"]:
    """What is read at a `tap` while the model runs, in float32.

    The mean is taken over tokens, the second of three dimensions, or over places, from the third of more; tokens that
    an ``attention_mask`` [batch, tokens] among the inputs leaves out do not count.

    Args:
        module: in evaluation mode.
        pattern: of the module to read at, see `tap`.
        inputs: of the module.
        size: rows that run at once.

    Raises:
        UserError: nothing matches, it does not run, or what is read has not one row for each row of the inputs.
    """
    path, before = tap(module, pattern)
    seen: list[Any] = []

    def keep(leaf: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        value = next(iter((*args, *kwargs.values()))) if before else output
        seen.append(value if isinstance(value, Tensor) else value[0])  # of several, the last hidden state comes first

    found = []
    handle = module.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    try:
        for start in range(0, max(rows(inputs), 1), size):
            part = taken(inputs, slice(start, start + size))
            outputs(module, part)
            if not seen or seen[-1].ndim < 2 or len(seen[-1]) != rows(part):
                what = f"what it has is {list(seen[-1].shape)}" if seen else "it does not run"
                raise UserError(f"features: {path}: {what}, for {rows(part)} rows of inputs; name another module")
            mask = part.get("attention_mask") if isinstance(part, Mapping) else None
            found.append(_pooled(seen.pop().float(), mask))
    finally:
        handle.remove()
    return torch.cat(found)


def _pooled(read: Float[Tensor, "batch ..."], mask: Tensor | None) -> Float[Tensor, "batch width"]:
    if read.ndim == 3 and mask is not None and mask.shape == read.shape[:2]:
        return (read * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return read if read.ndim == 2 else read.mean(1) if read.ndim == 3 else read.flatten(2).mean(2)


def own_states(pool: "Pool") -> list[State]:
    """Each task's own tensors, in the models' order; for all the same names.

    Raises:
        UserError: a model has an own tensor that the base lacks, or lacks one that the base has.
    """
    names = [name for name in pool.base.state_dict() if is_own(pool, name)]
    found: list[State] = []
    for model, module in pool.tuned.items():
        state = {name: value.detach() for name, value in module.state_dict().items() if is_own(pool, name)}
        odd = sorted(set(names) ^ set(state))
        if odd:
            raise UserError(f"model {model!r}: only one of it and the base has the own tensor {odd[0]}; give both one")
        found.append({name: state[name] for name in names})
    return found


def with_own(module: nn.Module, state: State, own: State) -> nn.Module:
    """A copy of the module that holds these tensors, and own ones, whose shapes may be others."""
    result = with_weights(module, state)
    for name, value in own.items():
        path, _, local = name.rpartition(".")
        leaf = result.get_submodule(path)
        getattr(leaf, local).data = value.clone()
        if isinstance(leaf, nn.Linear):
            leaf.out_features, leaf.in_features = leaf.weight.shape
    return result
