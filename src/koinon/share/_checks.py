"""What must be true of every way of sharing, tried on a tiny encoder and four tasks in two groups."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from koinon.bench.checks import Fixture, Outcome
from koinon.core import Method, UserError
from koinon.nn.experts import Bank, Gates, read
from koinon.nn.params import stream
from koinon.nn.tasks import Task, shared_loss, task_loss
from koinon.nn.train import Batches, fit, predict
from koinon.share._contract import Share, Shared
from koinon.share.shared_bottom import SharedBottom

TASKS = (
    Task("like", group="positive"),
    Task("hate", group="negative"),
    Task("love", group="positive", weight=2.0),
    Task("stars", kind="regression", group="negative"),
)
WIDTH = 6


@dataclass
class Small:
    """Inputs of a tiny run."""

    encoder: nn.Module
    tasks: tuple[Task, ...]
    inputs: Tensor
    labels: dict[str, Tensor]


def small() -> Small:
    """48 rows of 5 numbers; labels that follow them, some missing."""
    numbers = stream(0, "small")
    encoder = nn.Sequential(nn.utils.skip_init(nn.Linear, 5, WIDTH), nn.Tanh())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers))
    inputs = torch.randn(48, 5, generator=numbers)
    scores = inputs @ torch.randn(5, len(TASKS), generator=numbers)
    labels = {t.name: s if t.kind == "regression" else (s > 0).float() for t, s in zip(TASKS, scores.T, strict=True)}
    labels["love"][::3] = torch.nan
    return Small(encoder, TASKS, inputs, labels)


def build(method: Method, given: Small, seed: int = 3) -> Shared:
    """The method's network on the tiny encoder."""
    assert isinstance(method, Share)
    return method.share(given.encoder, given.tasks, WIDTH, seed)


def trained(method: Method, given: Small, epochs: int = 3, lr: float = 0.01) -> Shared:
    """The same, after a few steps."""
    model = build(method, given)
    fit(model, Batches(given.inputs, given.labels, size=16, seed=5), shared_loss, epochs=epochs, lr=lr)
    return model


def apply(method: Method, given: Small) -> Outcome:
    """Predictions after a few steps of training."""
    return predict(trained(method, given), given.inputs)


def _one_output_a_task(method: Method) -> None:
    given = small()
    outputs = build(method, given)(given.inputs)
    assert list(outputs) == [task.name for task in TASKS], "outputs are not named as the tasks are"
    assert all(value.shape == (48,) for value in outputs.values()), "an output is not [batch]"


def _task_order_does_not_matter(method: Method) -> None:
    given = small()
    turned = replace(given, tasks=given.tasks[::-1])
    one, other = (build(method, g).eval()(given.inputs) for g in (given, turned))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=f"the output of {name} changes with the order of tasks")


def _rows_do_not_mix(method: Method) -> None:
    given = small()
    model = trained(method, given)
    together, alone = predict(model, given.inputs), predict(model, given.inputs[:2])
    for name in together:
        torch.testing.assert_close(together[name][:2], alone[name], msg="a prediction depends on the rows beside it")


def _towers_learn_their_own_task_only(method: Method) -> None:
    given = small()
    for place, task in enumerate(given.tasks):
        model = build(method, given)
        task_loss([task], model(given.inputs), given.labels).backward()
        for weight in model.towers.weights:
            assert weight.grad is not None
            reached = [i for i, grad in enumerate(weight.grad) if bool(grad.any())]
            assert reached == [place], f"the loss of {task.name} reaches the towers {reached}, its own is {place}"


def _everything_learns(method: Method) -> None:
    given = small()
    start = build(method, given).state_dict()
    model = trained(method, given)
    still = [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    assert not still, f"training leaves {', '.join(still)} as they were"
    encoder = [name for name, _ in model.named_parameters() if "encoder" in name]
    assert encoder, "the encoder is not part of the network"


def _all_state_is_saved(method: Method) -> None:
    given = small()
    model, other = trained(method, given), build(method, given, seed=9)
    other.load_state_dict(model.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(predict(model, given.inputs).values(), predict(other, given.inputs).values(), strict=True)
    ), "a network loaded from its saved state predicts otherwise"


def _the_seed_matters(method: Method) -> None:
    given = small()
    one, other = (dict(build(method, given, seed).named_parameters()) for seed in (1, 2))
    drawn = [name for name, value in one.items() if "encoder" not in name and value.unique().numel() > 1]
    assert drawn, "no parameter starts at random"
    same = [name for name in drawn if torch.equal(one[name], other[name])]
    assert not same, f"{', '.join(same)} start the same with another seed"


def _experts_start_different(method: Method) -> None:
    for module in build(method, small()).modules():
        if isinstance(module, Bank):
            for weight in module.weights:
                drawn = [w for w in weight if bool(w.any())]
                alike = [i for i, w in enumerate(drawn) if any(torch.equal(w, v) for v in drawn[:i])]
                assert not alike, f"the experts {alike} start as copies of others"


def _all_state_is_registered(method: Method) -> None:
    for where, module in build(method, small()).named_modules():
        for name, value in vars(module).items():
            found = value if isinstance(value, list | tuple) else [value]
            assert not any(isinstance(v, Tensor) for v in found), f"{where}.{name} is neither parameter nor buffer"


def _missing_labels_teach_nothing(method: Method) -> None:
    given = small()
    known = ~torch.isnan(given.labels["love"])
    task = next(task for task in given.tasks if task.name == "love")
    model = build(method, given).eval()
    slopes = []
    for rows in (torch.arange(len(known)), known.nonzero().squeeze(1)):
        model.zero_grad()
        task_loss([task], model(given.inputs[rows]), {"love": given.labels["love"][rows]}).backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*slopes, msg="rows without a label change a task's gradient")


def _a_weight_scales_its_tasks_gradients(method: Method) -> None:
    given = small()
    model = build(method, given).eval()
    slopes = []
    for weight in (1.0, 3.0):
        model.zero_grad()
        task_loss([replace(given.tasks[0], weight=weight)], model(given.inputs), given.labels).backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(3 * slopes[0], slopes[1], msg="a task's weight does not scale its gradients")


def _every_task_is_learned(method: Method) -> None:
    given = small()
    model = trained(method, given, epochs=60, lr=0.02).eval()
    for task in given.tasks:
        loss = task_loss([replace(task, weight=1.0)], model(given.inputs), given.labels).item()
        # A constant guess has about 0.7 (binary) and a loss above 1 (regression); probabilities taken for logits
        # cannot go below 0.31.
        assert loss < 0.2, f"{task.name} is not learned where it is easy: loss {loss:.2f} after 180 steps"


class _Halves(nn.Module):
    """An encoder whose output comes in two parts."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(inputs).split([WIDTH - 2, 2], 1)


def _an_encoder_may_give_parts(method: Method) -> None:
    given = small()
    whole, halves = (build(method, replace(given, encoder=e)) for e in (given.encoder, _Halves(given.encoder)))
    for model in (whole, halves):
        task_loss(given.tasks, model(given.inputs), given.labels).backward()
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg="an encoder's output in parts is not read as a whole")


def _gates_are_convex(method: Method) -> None:
    given = small()
    model = trained(method, given)
    for gates in model.modules():
        if isinstance(gates, Gates) and gates.squash == "softmax":
            (logits,) = read(torch.randn(7, gates.weight.shape[2], generator=stream(0, "gates")), gates)
            weights = gates.weights(logits)
            assert bool((weights >= 0).all()), "a gate is negative"
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]), msg="a gate does not sum to 1")


def _refuses_repeated_and_absent_tasks(method: Method) -> None:
    given = small()
    repeated: Sequence[Task] = (TASKS[0], TASKS[0])
    for tasks in ((), repeated):
        try:
            build(method, replace(given, tasks=tuple(tasks)))
        except UserError:
            continue
        raise AssertionError(f"accepts the tasks {[task.name for task in tasks]}")


def _works_with_one_task(method: Method) -> None:
    given = replace(small(), tasks=TASKS[:1])
    assert list(build(method, given)(given.inputs)) == ["like"]


FIXTURE = Fixture(
    contract=Share,
    baseline=SharedBottom,
    arguments=small,
    apply=apply,
    properties={
        "one_output_a_task": _one_output_a_task,
        "task_order_does_not_matter": _task_order_does_not_matter,
        "rows_do_not_mix": _rows_do_not_mix,
        "towers_learn_their_own_task_only": _towers_learn_their_own_task_only,
        "everything_learns": _everything_learns,
        "all_state_is_saved": _all_state_is_saved,
        "the_seed_matters": _the_seed_matters,
        "experts_start_different": _experts_start_different,
        "all_state_is_registered": _all_state_is_registered,
        "missing_labels_teach_nothing": _missing_labels_teach_nothing,
        "a_weight_scales_its_tasks_gradients": _a_weight_scales_its_tasks_gradients,
        "every_task_is_learned": _every_task_is_learned,
        "an_encoder_may_give_parts": _an_encoder_may_give_parts,
        "gates_are_convex": _gates_are_convex,
        "refuses_repeated_and_absent_tasks": _refuses_repeated_and_absent_tasks,
        "works_with_one_task": _works_with_one_task,
    },
)
