"""The optimiser that takes back a share of each update: exact counts, exact values, and a place wherever one stands."""

import copy
import math
import pickle

import pytest
import torch
from oracles.edit_dilute import filtered
from torch import nn

from koinon.core import UserError
from koinon.nn import updates
from koinon.nn.params import stream
from koinon.nn.updates import Filtered, Given, Update, above, count_of, kth_largest, largest

SHAPES = ((3, 4), (5,), (2, 2, 2))


def drawn(seed: int = 0) -> list[nn.Parameter]:
    numbers = stream(seed, "parameters")
    return [nn.Parameter(torch.randn(shape, generator=numbers)) for shape in SHAPES]


def flat(held) -> torch.Tensor:
    return torch.cat([its.detach().flatten() for its in held])


def run(make, steps: int = 3, decay: float = 0.0):
    """The parameters after each of a few steps with gradients of their own."""
    held = drawn()
    optimizer = make(torch.optim.AdamW(held, lr=0.1, weight_decay=decay))
    found = [flat(held)]
    for step in range(steps):
        optimizer.zero_grad()
        numbers = stream(step, "gradients")
        for its in held:
            its.grad = torch.randn(its.shape, generator=numbers)
        optimizer.step()
        found.append(flat(held))
    return found


def plain(steps: int = 3, decay: float = 0.0):
    return run(lambda its: its, steps, decay)


def test_no_share_is_plain_training_to_the_bit():
    for its in ({}, {"per": "tensor"}, {"which": "random"}, {"every": 2}, {"sample": 5}):
        found = run(lambda optimizer, its=its: Filtered(optimizer, 0.0, **its))
        assert all(torch.equal(one, other) for one, other in zip(found, plain()))


def test_the_whole_share_learns_nothing():
    for its in ({}, {"per": "tensor"}, {"which": "random"}):
        found = run(lambda optimizer, its=its: Filtered(optimizer, 1.0, **its), decay=0.1)
        assert all(torch.equal(its, found[0]) for its in found)


@pytest.mark.parametrize("share", [0.01, 0.08, 0.3, 0.5, 0.96])
@pytest.mark.parametrize("which", ["largest", "others"])
def test_a_step_equals_the_oracle(share, which):
    """Decay is part of the update; what is kept is what the optimiser did, to the bit."""
    before, after = plain(1, decay=0.3)
    found = run(lambda its: Filtered(its, share, which), 1, decay=0.3)[1]
    expected, dropped = filtered(before.tolist(), after.tolist(), share, which)
    assert torch.equal(found, torch.tensor(expected))
    assert int((found == before).sum()) == len(dropped)
    assert len(dropped) in (math.ceil(share * 25), 25 - math.ceil(share * 25))


def test_within_each_tensor():
    before, after = plain(1)
    found = run(lambda its: Filtered(its, 0.3, per="tensor"), 1)[1]
    sizes = [math.prod(shape) for shape in SHAPES]
    parts = [its.split(sizes) for its in (before, after, found)]
    for old, new, its in zip(*parts):
        assert torch.equal(its, torch.tensor(filtered(old.tolist(), new.tolist(), 0.3)[0]))
    assert not torch.equal(found, run(lambda its: Filtered(its, 0.3), 1)[1])


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_ignored_and_kept_add_up_to_the_whole_update(per):
    before, after = plain(1)
    parts = [run(lambda its, w=which: Filtered(its, 0.2, w, per), 1)[1] for which in ("largest", "others")]
    changed = [part != before for part in parts]
    assert bool((changed[0] ^ changed[1]).all())
    assert torch.equal(torch.where(changed[0], *parts), after)


def test_equal_entries_are_dropped_from_the_front():
    held = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))]
    for its in held:
        its.grad = torch.ones_like(its)
    Filtered(torch.optim.SGD(held, lr=1.0), 0.7).step()
    assert flat(held).tolist() == [0, 0, 0, 0, 0, -1, -1]


def test_counts_are_those_of_decimal_fractions():
    assert count_of(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001
    assert [count_of(0.08, entries) for entries in (1, 12, 13, 100, 101)] == [1, 1, 2, 8, 9]
    assert count_of(1e-9, 1000) == 1
    for count in range(6):
        sizes = Given(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), [2, 3])
        found = torch.cat(list(largest(sizes, count)))
        assert found.tolist() == [[1, 2, 4, 0, 3].index(place) < count for place in range(5)]


@pytest.mark.parametrize("kind", ["spread", "tied", "mostly zero", "sorted"])
def test_thresholds_are_exact_in_large_models(kind):
    size = torch.rand(300_000, generator=stream(0, kind)) ** 4
    if kind == "tied":
        size = (size * 10).round()
    if kind == "mostly zero":
        size = size * (torch.rand(len(size), generator=stream(1, kind)) < 0.01)
    if kind == "sorted":
        size = size.sort().values
    ordered = size.sort(descending=True).values
    for count in (1, 3, 500, 8_000, 150_000, 299_000, 300_000):
        sizes = Given(size, [180_000, 120_000])
        least, equal = kth_largest(sizes, count)
        assert least == ordered[count - 1]
        among = int((ordered[:count] == least).sum())
        assert equal == (among if among < int((size == least).sum()) else None)
        found = torch.cat(list(largest(sizes, count)))
        assert int(found.sum()) == count
        assert float(size[found].min()) == ordered[count - 1]


def test_random_drops_as_many_and_others_each_time():
    held = drawn()
    optimizer = Filtered(torch.optim.SGD(held, lr=1.0), 0.2, "random", seed=3)
    gone = []
    for _ in range(4):
        before = flat(held)
        for its in held:
            its.grad = torch.ones_like(its)
        optimizer.step()
        gone.append((flat(held) == before).nonzero()[:, 0].tolist())
    assert {len(its) for its in gone} == {5}
    assert len({tuple(its) for its in gone}) > 1


def test_several_steps_as_one_update():
    """Nothing is taken back until the last of them, and then of their sum."""
    found, usual = run(lambda its: Filtered(its, 0.2, every=3)), plain()
    assert all(torch.equal(one, other) for one, other in zip(found[:3], usual[:3]))
    assert torch.equal(found[3], torch.tensor(filtered(usual[0].tolist(), usual[3].tolist(), 0.2)[0]))


def test_a_sampled_threshold_drops_about_as_many():
    size = torch.rand(20_000, generator=stream(0, "sizes"))
    sizes = Given(size, [5_000, 15_000])
    found = torch.cat(list(above(sizes, 0.08, 2_000, stream(1, "sample"))))
    assert 0.06 < found.float().mean() < 0.10
    assert float(size[found].min()) > float(size[~found].max())
    assert not any(its.any() for its in above(sizes, 0.0, 10, stream(1, "sample")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_update_in_pieces_is_the_update(monkeypatch, dtype):
    """Large parameters in parts, small ones together, others of other strides whole; nothing rounded."""
    monkeypatch.setattr(updates, "PIECE", 8)
    numbers = stream(0, "pieces")
    shapes = ((3, 4), (2,), (3,), (4, 5), (), (7,))
    now, before = ([torch.randn(shape, generator=numbers).to(dtype) for shape in shapes] for _ in range(2))
    now[3] = now[3].t().contiguous().t()
    update = Update(now, before)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (flat(now).to(wide) - flat(before).to(wide)).abs()
    assert update.lengths == [8, 4 + 2, 3, 20, 1 + 7]
    assert len(update) == len(expected) == sum(update.lengths)
    assert torch.equal(torch.cat([its.clone() for its in update]), expected)
    assert torch.equal(torch.cat([its.clone() for its in update]), expected), "asked for twice"
    places = torch.tensor([0, 0, 3, 11, 12, 16, 17, 36, 37, 44])
    assert torch.equal(update.at(places), expected[places])


@pytest.mark.parametrize("which", ["largest", "others", "random"])
def test_pieces_change_nothing(monkeypatch, which):
    found = []
    for piece in (1, 7, 10**6):
        monkeypatch.setattr(updates, "PIECE", piece)
        found.append(run(lambda its: Filtered(its, 0.3, which), 2)[2])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_sample_finds_the_same_threshold_in_any_pieces(monkeypatch):
    found = []
    for piece in (1, 7, 10**6):
        monkeypatch.setattr(updates, "PIECE", piece)
        found.append(run(lambda its: Filtered(its, 0.3, sample=20), 2)[2])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_random_entries_are_sampled_as_the_largest_are():
    before, after = plain(1)
    found = run(lambda its: Filtered(its, 0.3, "random", sample=5, seed=2), 1)[1]
    numbers = stream(2, "update", 1, 0)
    size = torch.rand(25, generator=numbers)
    (dropped,) = above(Given(size, [25]), 0.3, 5, numbers)
    assert torch.equal(found, torch.where(dropped, before, after))


def test_momentum_brings_dropped_entries_up_again():
    """The optimiser's memory is left as it is."""
    held = [nn.Parameter(torch.zeros(2))]
    optimizer = Filtered(torch.optim.SGD(held, lr=1.0, momentum=1.0), 0.5)
    held[0].grad = torch.tensor([2.0, 1.0])
    optimizer.step()
    assert held[0].tolist() == [0.0, -1.0]
    assert optimizer.state[held[0]]["momentum_buffer"].tolist() == [2.0, 1.0]


def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path):
    def steps(optimizer, held, numbers):
        for number in numbers:
            for its in held:
                its.grad = torch.randn(its.shape, generator=stream(number, "gradients"))
            optimizer.step()

    def make(held):
        return Filtered(torch.optim.AdamW(held, lr=0.1), 0.2, "random", every=2)

    one = drawn()
    optimizer = make(one)
    steps(optimizer, one, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    other = [nn.Parameter(its.detach().clone()) for its in one]
    again = make(other)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for its, held in ((optimizer, one), (again, other)):
        steps(its, held, range(3, 6))
    assert torch.equal(flat(one), flat(other))
    assert again.param_groups is again.optimizer.param_groups
    assert again.state is again.optimizer.state


def test_copies_and_pickles_stand_alone():
    optimizer = Filtered(torch.optim.AdamW(drawn(), lr=0.1), 0.2)
    for its in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert its.param_groups is its.optimizer.param_groups
        before = flat(its.parameters)
        for held in its.parameters:
            held.grad = torch.ones_like(held)
        its.step()
        assert int((flat(its.parameters) == before).sum()) == 5


def test_a_scheduler_and_a_closure_reach_the_optimiser():
    held = drawn()
    optimizer = Filtered(torch.optim.SGD(held, lr=1.0), 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = sum((its**2).sum() for its in held)
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.step(closure).item() == pytest.approx(first)  # x - 1 * 2 x = -x


def test_a_group_may_be_added_later():
    held = drawn()
    optimizer = Filtered(torch.optim.SGD(held[:1], lr=1.0), 0.5, every=2)
    for its in held:
        its.grad = torch.ones_like(its)
    optimizer.step()
    optimizer.add_param_group({"params": held[1:], "lr": 0.5})
    before = flat(held[1:])
    optimizer.step()
    assert len(optimizer.parameters) == 3
    assert not torch.equal(flat(held[1:]), before)


def test_in_a_trainer_with_low_rank_adapters(tmp_path):
    """A quarter of what the adapters learn is taken back."""
    import peft
    from transformers import Trainer, TrainingArguments

    from koinon.lm.small import decoder, tokenizer_of

    tokenizer = tokenizer_of(["a b c"], 259)
    with torch.random.fork_rng():
        model = peft.get_peft_model(
            decoder(tokenizer, width=16, layers=1, heads=2, wide=16),
            peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )
        learns = [its for its in model.parameters() if its.requires_grad]
        before = flat(learns)
        optimizer = Filtered(torch.optim.AdamW(learns, lr=0.1, weight_decay=0.1), 0.25)
        rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(2)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert optimizer.steps == 1
    assert int((flat(learns) == before).sum()) == math.ceil(len(before) / 4)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"share": 1.5}, "share 1.5"),
        ({"every": 0}, "every 0"),
        ({"sample": -1}, "sample -1"),
        ({"which": "most"}, "most"),
        ({"per": "layer"}, "layer"),
    ],
)
def test_what_is_no_filter_is_refused(named, said):
    with pytest.raises(UserError, match=said):
        Filtered(torch.optim.SGD(drawn(), lr=1.0), **named)
