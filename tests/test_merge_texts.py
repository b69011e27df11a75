"""Merging compared on texts: the conversations and their parts, the decoder, and a tiny comparison from end to end."""

import dataclasses
import zipfile

import numpy as np
import pytest
import torch

from koinon.core import UserError
from koinon.data import sources
from koinon.data.texts import SHARES, TextTask, conversations, groups, joined, made, spoken, windows, world_of
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.twin import TwinMerging
from koinon.nn.decoder import Decoder
from koinon.recipes._contestants import Static, Twins, grid
from koinon.recipes._texts import SCALES, TextRecipe, Texts, bits, bits_per_byte, on_texts, text_experts
from koinon.recipes.merge import options

TINY = SCALES["tiny"]


@pytest.fixture(scope="module")
def world():
    return TextRecipe(scale="tiny").prepare()


@pytest.fixture(scope="module")
def given(world, tmp_path_factory) -> Texts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOINON_CACHE", str(tmp_path_factory.mktemp("cache")))
        first = text_experts(world, TINY.training, 0)
        again = text_experts(world, TINY.training, 0)
        for name, model in first.tuned.items():
            states = [its.state_dict() for its in (model, again.tuned[name])]
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        yield Texts(world, first, TINY.training, TINY.routing, 0)


# The conversations.


def lines(text: bytes) -> set[str]:
    return {line.casefold() for line in text.decode().splitlines() if line}


def test_no_line_is_in_two_parts_and_the_base_has_read_none_that_is_kept_back():
    hello = [
        ("Hello", "Hi"),
        ("hi", "How are you?"),
        ("Hello", "Hi"),
        *((f"Why {n}?", f"{n} is fine") for n in range(60)),
    ]
    ciao = [("Ciao", f"Come va {n}?") for n in range(20)] + [(f"{n} is fine", f"Perché {n}") for n in range(40)]
    others = [[(f"{n} is fine", f"Weil {n}") for n in range(60)]]
    cut = world_of({"one": hello, "two": ciao}, others, {"one": 1.0, "two": 0.5})
    parts = {part: set().union(*(lines(task.parts[part]) for task in cut.tasks.values())) for part in SHARES}
    for part, held in parts.items():
        assert held
        for other in set(SHARES) - {part}:
            assert not held & parts[other]
        if part != "train":
            assert not held & lines(cut.general)
    assert {"ciao", "come va 7?"} <= parts["train"]  # too many are linked by one line
    assert sum(its.parts[part].count(b"Hello\nHi\n") for its in cut.tasks.values() for part in SHARES) == 1
    assert len(lines(cut.general) & parts["train"]) > 40


def test_parts_have_their_shares(world):
    total = {part: sum(len(task.parts[part]) for task in world.tasks.values()) for part in SHARES}
    for part, share in SHARES.items():
        assert total[part] / sum(total.values()) == pytest.approx(share, abs=0.06)


def test_groups_are_linked_through_others():
    assert groups([("a", "b"), ("c",), ("d", "B"), ("e", "d"), ("f", "c")]) == [0, 1, 0, 0, 1]


def test_a_world_hangs_on_its_seed():
    one, same, other = made(2, 30), made(2, 30), made(2, 30, seed=1)
    assert one == same
    assert one != other


def test_windows_give_the_bytes_back():
    text = joined([("Wie geht's?", "Schön – und dir?"), ("Ça va.",)])
    rows = windows(text, 8, 8)
    assert rows.dtype == np.uint8
    assert bytes(rows.flatten()) == text[: rows.size]
    assert len(text) - rows.size < 8
    assert text.decode() == "Wie geht's?\nSchön – und dir?\n\nÇa va.\n\n"
    over = windows(text, 8, 5)
    assert bytes(over[0]) + b"".join(bytes(its[3:]) for its in over[1:]) == text[: 8 + 5 * (len(over) - 1)]
    with pytest.raises(UserError, match="9 bytes: 10 are needed"):
        windows(b"123456789", 10, 1)


def test_each_byte_behind_the_first_prompt_is_scored_once():
    training = TINY.training
    text = bytes(range(256)) * 2
    rows = training.windows(text)
    assert rows.shape[1] == training.context
    scored = rows[:, training.prompt :].flatten().tolist()
    assert bytes(scored) == text[training.prompt :][: len(scored)]


def test_conversations_are_read_in_place_from_the_archive(tmp_path, monkeypatch):
    file = tmp_path / "carrier.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("corpus/two/b.yml", "categories: [x]\nconversations:\n- - Ja?\n  - 1984\n")
        archive.writestr("corpus/two/a.yml", "conversations:\n- [' Hallo ', Hoi, Dag]\n")
        archive.writestr("corpus/three/a.yml", "conversations: 1")
    source = dataclasses.replace(sources.SOURCES["chats"], members={"two": "corpus/two/"})
    monkeypatch.setattr(sources, "SOURCES", {"chats": source})
    monkeypatch.setattr(sources, "get", lambda name: file)
    assert spoken("two") == [("Hallo", "Hoi", "Dag"), ("Ja?", "1984")]
    assert conversations(b"conversations: []") == []


# The decoder.


def test_a_later_symbol_changes_no_earlier_logit():
    model = Decoder(20, 12, 2, 3, 10, seed=0)
    row = torch.randint(20, (1, 10), generator=torch.Generator().manual_seed(0))
    start = model(row)
    for place in range(10):
        other = row.clone()
        other[0, place] = (row[0, place] + 1) % 20
        changed = (model(other) != start)[0].any(1)
        assert not changed[:place].any()
        assert changed[place:].all()
    torch.testing.assert_close(model(row[:, :6]), start[:, :6])


def test_a_decoder_is_drawn_from_its_seed_alone():
    before = torch.random.get_rng_state()
    one, same, other = Decoder(seed=0), Decoder(layers=1, seed=0), Decoder(seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in same.state_dict().items():
        assert torch.equal(value, one.state_dict()[name])
    assert not torch.equal(one.head.weight, other.head.weight)
    assert one(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 256)
    with pytest.raises(UserError, match="97 symbols"):
        one(torch.zeros(1, 97, dtype=torch.long))
    with pytest.raises(UserError, match="multiple"):
        Decoder(width=10, heads=3)


# The comparison.


def test_bits_are_those_of_the_next_byte():
    rows = torch.tensor([[3, 1, 2, 0]])
    logits = torch.full((1, 4, 4), -1e4)
    logits[0, 1, 2] = logits[0, 2, 0] = 0  # after place 1 comes a 2, after place 2 a 0
    assert bits(logits, rows, 2).tolist() == [0]
    assert bits(torch.zeros(1, 4, 4), rows, 3).tolist() == [2]


def test_every_method_with_coefficients_has_six_points():
    for label, its in on_texts(3).items():
        assert len(getattr(its, "points", ())) in (0, 1, 6), label


def test_experts_bound_the_others_and_full_twins_reach_them(given):
    points = grid(scale=(0.1, 0.3))
    contestants = on_texts(3) | {
        "task_arithmetic": Static(TaskArithmetic(), points),
        "twin_full_oracle": Twins(TwinMerging(rank=1.0), points, oracle=True),
    }
    chosen = ("individual", "base", "task_arithmetic", "twin_full_oracle")
    found = {label: bits_per_byte(given, contestants[label].enter(given).served) for label in chosen}
    assert found["individual"]["told.normalised"].value == 100
    assert found["twin_full_oracle"]["mean.normalised"].value == pytest.approx(100, abs=1e-3)
    assert found["base"]["mean.normalised"].value < 97
    assert np.isnan(found["base"]["router.accuracy"].value)
    assert found["individual"]["router.accuracy"].value > 0.5
    assert np.array_equal(found["base"]["mean.normalised"].draws, found["base"]["told.normalised"].draws)
    for its in found.values():
        assert 0 < its["mean.bits_per_byte"].value < 8
        assert len(its["mean.normalised"].draws) == 100


def test_a_router_sees_the_prompt_only(given):
    """Whatever follows, the weights are the same."""
    rows, task = given.stream("test")
    prompt = TINY.training.prompt
    other = torch.cat([rows[:, :prompt], rows.flip(0)[:, prompt:]], 1)
    for label in ("individual", "twin"):
        method = dataclasses.replace(on_texts(3)[label], **({"points": ({},)} if label == "twin" else {}))
        served = method.enter(given).served
        assert torch.equal(served.routed(rows, task)[0], served.routed(other, task)[0])


def test_nothing_is_chosen_on_the_test_part(given, world):
    tasks = {}
    for name, task in world.tasks.items():
        tasks[name] = TextTask(name, dict(task.parts) | {"test": task.parts["test"][::-1]})
    found = text_experts(world, TINY.training, 0)
    other = Texts(dataclasses.replace(world, tasks=tasks), found, TINY.training, TINY.routing, 0)
    contestant = Static(TaskArithmetic(), grid(scale=(0.1, 0.3, 0.5)))
    assert contestant.enter(other).chosen == contestant.enter(given).chosen


@pytest.mark.parametrize("label", ["task_arithmetic", "adamerging"])
def test_a_tiny_cell_repeats_exactly(label, given, world):
    recipe = TextRecipe(scale="tiny")
    before = torch.random.get_rng_state()
    rows = [recipe.cell(world, recipe.contestants(world)[label], 0) for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert rows[0]["draws"] == rows[1]["draws"]
    assert rows[0]["metrics"]["router.accuracy"] is None
    assert rows[0]["cost"]["stored_bytes"] == 4 * sum(its.numel() for its in given.pool.base.state_dict().values())
    assert recipe.settings(world)["main"] in rows[0]["metrics"]


def test_options_make_the_recipe():
    kind = options([])
    assert kind("texts", "tiny").recipe() == TextRecipe("texts", "tiny")
    assert kind("texts").recipe().name == "merge-texts"
