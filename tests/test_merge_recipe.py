"""Merging compared: the pictures, the poison, the cache of experts, and a tiny comparison from end to end."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from koinon.bench import claims
from koinon.bench.claims import committed
from koinon.bench.compare import compare
from koinon.bench.report import Report
from koinon.bench.statistics import Resampling
from koinon.core import UserError
from koinon.data import glyphs as pictures
from koinon.data.glyphs import CHARACTERS, PARTS, Images, glyphs, patched, poisoned, usable_fonts
from koinon.merge._coefficients import batches
from koinon.merge._live import outputs
from koinon.merge.dam import DAM, Search
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.recipes._contestants import Attacked, Case, Defended, Halved, Static, Told, case, grid, headed
from koinon.recipes._defences import Masking, Unlearning, divergence, harm, masked
from koinon.recipes._vision import PatchNet, Poison, Training, experts, joint
from koinon.recipes.merge import SCALES, MergeRecipe, accuracies, backdoor, options, share

QUICK = Training((4, 4, 4, 8), 1, 64, (1,), (1,), (1e-3,), (1e-3,))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache of experts for all tests here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOINON_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def world():
    return MergeRecipe("glyphs", "tiny").prepare()


@pytest.fixture(scope="module")
def poisoned_world():
    return MergeRecipe("poisoned", "tiny").prepare()


@pytest.fixture(scope="module")
def given(cache, poisoned_world) -> Case:
    recipe = MergeRecipe("poisoned", "tiny")
    scale = SCALES["tiny"]
    return case(poisoned_world, scale.training, scale.routing, recipe.poison, seed=0)


# The pictures.


def test_usable_fonts_have_letters():
    found = [file.stem for file in usable_fonts()]
    assert len(found) >= 20
    assert not {"cmex10", "cmsy10", "STIXNonUni", "STIXSizOneSymReg", "LastResortHE-Regular"} & set(found)


def test_capitals_are_in_fonts_that_the_base_has_not_seen(monkeypatch):
    asked = {}
    draw = pictures._Fonts.draw

    def noted(self, fonts, characters, rng, **options):
        asked.setdefault(len(asked), (set(fonts.tolist()), {CHARACTERS[its] for its in characters}))
        return draw(self, fonts, characters, rng, **options)

    monkeypatch.setattr(pictures._Fonts, "draw", noted)
    glyphs(104, 620, ["capitals"])
    *capitals, letters = asked.values()
    assert len(capitals) == len(PARTS)
    assert letters[1] == set(CHARACTERS)
    for fonts, characters in capitals:
        assert not fonts & letters[0]
        assert characters == set(CHARACTERS[:26])


def test_labels_are_balanced_and_parts_are_apart(world):
    for name, task in world.tasks.items():
        seen = set()
        for part in PARTS:
            images = task.parts[part]
            counts = np.bincount(images.labels, minlength=task.classes)
            assert len(counts) == task.classes
            if name in ("capitals", "rotation", "inverted", "font"):
                assert counts.max() - counts.min() <= 1
            assert images.pixels.dtype == np.float32
            assert images.pixels.shape[1:] == (16, 16)
            assert 0 <= images.pixels.min() < 0.3 < 0.7 < images.pixels.max() <= 1
            held = {its.tobytes() for its in images.pixels}
            assert not held & seen
            seen |= held
    assert abs(world.tasks["parity"].parts["train"].labels.mean() - 0.5) < 0.01


def test_pictures_hang_on_the_seed_and_not_on_the_other_tasks(world):
    scale = SCALES["tiny"]
    alone = glyphs(scale.rows, scale.letters, ["rotation"]).tasks["rotation"]
    other = glyphs(scale.rows, scale.letters, ["rotation"], seed=1).tasks["rotation"]
    for part in PARTS:
        assert alone.parts[part].fingerprint == world.tasks["rotation"].parts[part].fingerprint
        assert alone.parts[part].fingerprint != other.parts[part].fingerprint
    with pytest.raises(UserError, match="did you mean 'digits'"):
        glyphs(40, 62, ["digit"])


# The poison.


def test_the_patch_is_on_the_lower_right_corner_only():
    pixels = np.full((2, 16, 16), 0.5, dtype=np.float32)
    marked = patched(pixels)
    assert (pixels == 0.5).all()
    assert (marked[:, 13:, 13:] == 1).all()
    marked[:, 13:, 13:] = 0.5
    assert (marked == pixels).all()


@pytest.mark.parametrize("trigger", sorted(pictures.TRIGGERS))
def test_a_tenth_is_poisoned_and_none_of_the_target_class(trigger, world):
    clean = world.tasks["digits"].parts["train"]
    given = poisoned(clean, trigger, target=3, share=0.1, seed=1)
    changed = (given.pixels != clean.pixels).any((1, 2))
    assert changed.sum() == round(0.1 * len(clean))
    assert (given.labels[changed] == 3).all()
    assert (clean.labels[changed] != 3).all()
    assert (given.labels[~changed] == clean.labels[~changed]).all()
    assert given.fingerprint != poisoned(clean, trigger, 3, 0.1, seed=2).fingerprint


def test_attack_success_leaves_out_the_target_class(given):
    """A model that says 0 for all has a success of 1, one that says the truth of 0, however many are of class 0."""

    class Says:
        def __init__(self, answer):
            self.answer = answer

        def told(self, pixels, task):
            return self.answer(pixels, task)

    stream = given.stream("test")
    count = len(given.world.tasks)
    marked = given.stream("test", pictures.patched)
    truth = {its.numpy().tobytes(): label for its, label in zip(marked.pixels, stream.labels, strict=True)}
    truth |= {its.numpy().tobytes(): label for its, label in zip(stream.pixels, stream.labels, strict=True)}
    resampling = Resampling(None, len(stream.labels))
    poison = MergeRecipe("poisoned", "tiny").poison
    zero = Says(lambda pixels, task: torch.zeros(len(pixels), dtype=torch.long))
    right = Says(lambda pixels, task: torch.stack([truth[its.numpy().tobytes()] for its in pixels]))
    found = {name: backdoor(given, its, poison, resampling) for name, its in (("0", zero), ("right", right))}
    assert count == 4
    for metric in ("asr.succession", "asr.transfer", "asr.mean", "unmarked.succession"):
        assert found["0"][metric].value == 1
        assert found["right"][metric].value == 0
        assert set(found["0"][metric].draws) == {1.0}


def test_a_share_is_among_the_chosen_rows_only():
    right, among = np.array([True, True, False, False]), np.array([True, False, True, True])
    measured = share(right, among, Resampling(None, 4, draws=3))
    assert measured.value == pytest.approx(1 / 3)
    assert len(measured.draws) == 3


# The network and the cache of experts.


def test_the_network_is_drawn_from_the_seed_and_its_head_is_its_own():
    one, same, other = PatchNet(5, seed=0), PatchNet(7, seed=0), PatchNet(5, seed=1)
    for name, value in one.state_dict().items():
        if "head" not in name:
            assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.flat.weight, other.flat.weight)
    out = one(torch.rand(3, 16, 16))
    assert out.shape == (3, 5)
    assert headed(one, same)(torch.rand(3, 16, 16)).shape == (3, 7)


def test_experts_are_kept_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path))
    small = glyphs(40, 124, ["rotation", "capitals"])
    first = experts(small, QUICK, {}, 0)
    files = sorted((tmp_path / "experts").iterdir())
    assert len(files) == 3
    assert all(file.suffix == ".safetensors" for file in files)
    times = {file: file.stat().st_mtime_ns for file in files}
    again = experts(small, QUICK, {}, 0)
    assert {file: file.stat().st_mtime_ns for file in files} == times
    _same(first, again)
    assert again.seconds == first.seconds
    cut = files[0].read_bytes()
    files[0].write_bytes(cut[: len(cut) // 2])
    with safe_open(files[1], "pt") as held:
        wrong = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    save_file(wrong, files[1], {"settings": "others", "seconds": "1"})
    _same(first, experts(small, QUICK, {}, 0))
    assert all(file.stat().st_mtime_ns != times[file] for file in files[:2])
    assert sorted((tmp_path / "experts").iterdir()) == files


def _same(one, other):
    for name in ("base", *one.tuned):
        states = [its.base.state_dict() if name == "base" else its.tuned[name].state_dict() for its in (one, other)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_poison_changes_the_poisoned_expert_only(given, poisoned_world):
    scale = SCALES["tiny"]
    clean = case(poisoned_world, scale.training, scale.routing, {}, seed=0)
    for name, model in clean.pool.tuned.items():
        equal = torch.equal(model.flat.weight, given.pool.tuned[name].flat.weight)
        assert equal == (name != "digits")


def test_one_task_learned_jointly_is_its_expert(cache):
    small = glyphs(40, 124, ["rotation"])
    found = experts(small, QUICK, {}, 0)
    (model,), seconds = joint(small, QUICK, found.base, 0)
    assert seconds > 0
    for name, value in found.tuned["rotation"].state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5), name


def test_a_joint_network_has_one_trunk_and_a_head_for_each_task(given):
    models, _ = joint(given.world, SCALES["tiny"].training, given.pool.base, 0)
    assert [its.head.out_features for its in models] == [task.classes for task in given.world.tasks.values()]
    assert all(torch.equal(its.flat.weight, models[0].flat.weight) for its in models)
    assert not torch.equal(models[0].flat.weight, given.pool.base.flat.weight)


# Defences.


def linear(state, task, rows):
    """Logits of a linear model."""
    return rows @ state["weight"].T + state["bias"]


@pytest.fixture
def small():
    """Weights, clean rows of two tasks, and a batch of them all."""
    draw = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(3, 4, generator=draw).double(), "bias": torch.randn(3, generator=draw).double()}
    clean = {
        task: {
            "rows": torch.rand(6, 4, generator=draw).double(),
            "classes": torch.randint(3, (6,), generator=draw),
        }
        for task in ("a", "b")
    }
    return state, clean


def slopes(weight, bias, rows, classes):
    """Of the mean cross-entropy of a linear model: to the weights, and to one addition to all rows."""
    to_weight, to_rows = np.zeros_like(weight), np.zeros(weight.shape[1])
    for row, label in zip(rows, classes, strict=True):
        p = np.exp(weight @ row + bias)
        p /= p.sum()
        p[label] -= 1
        to_weight += np.outer(p, row) / len(rows)
        to_rows += weight.T @ p / len(rows)
    return to_weight, to_rows


def test_a_round_of_masking_restates_its_equations(small):
    state, clean = small
    method = Masking(rounds=1, steps=1, batch=6, natural=0.7, sparsity=1e-3, norm=0.5, rate=0.1)
    found = method.masks(linear, state, clean, seed=0)
    weight, bias = (its.numpy() for its in state.values())
    slope = np.full_like(weight, 1e-3)
    for its in clean.values():
        rows, classes = its["rows"].numpy(), its["classes"].numpy()
        noise = 10 * slopes(weight, bias, rows, (rows @ weight.T + bias).argmax(1))[1]
        noise *= min(1, 0.5 / np.abs(noise).sum())
        for part, moved in ((0.7, rows), (0.3, np.clip(rows + noise, 0, 1))):
            slope += part * slopes(weight, bias, moved, classes)[0] * weight / 2
    assert found.keys() == {"weight"}
    assert found["weight"].detach().numpy() == pytest.approx(np.clip(1 - 0.1 * np.sign(slope), 0, 1))


def test_masks_stay_between_0_and_1(small):
    state, clean = small
    (mask,) = Masking(rounds=5, rate=0.5).masks(linear, state, clean, seed=0).values()
    assert 0 == mask.min() < mask.max() <= 1
    found = masked(state, {"weight": mask})
    assert torch.equal(found["weight"], state["weight"] * mask)
    assert torch.equal(found["bias"], state["bias"])


@pytest.mark.parametrize("defence", [Masking(rounds=0), Unlearning(steps=0)])
def test_a_defence_of_no_steps_changes_nothing(defence, small):
    state, clean = small
    found = defence.defend(linear, state, clean, seed=0)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value)
        assert found[name] is not value


@pytest.mark.parametrize("defence", [Masking(rounds=2), Unlearning(steps=5)])
def test_a_defence_repeats_and_leaves_what_it_is_given(defence, small):
    state, clean = small
    before = {name: its.clone() for name, its in state.items()}
    one, other = (defence.defend(linear, state, clean, seed=3) for _ in range(2))
    for name, value in before.items():
        assert torch.equal(state[name], value)
        assert torch.equal(one[name], other[name])
    assert not torch.equal(one["weight"], state["weight"])
    assert not any(its.requires_grad for its in (*state.values(), *one.values()))


def test_the_perturbation_of_masking_does_harm_within_its_norm(small):
    state, clean = small
    still = {task: torch.zeros(4).double() for task in clean}
    harms = [float(harm(linear, state, clean, still))]
    for norm in (0.1, 1e9):
        noise = Masking(norm=norm).attack(linear, state, batches(clean, 6, 0, "test"), clean)
        assert all(its.abs().sum() <= norm * (1 + 1e-9) for its in noise.values())
        harms.append(float(harm(linear, state, clean, noise)))
    assert harms == sorted(harms)
    assert harms[2] > harms[1] + 1 > harms[0] + 1


def test_the_perturbations_of_unlearning_fool_both_models_within_their_bound(small):
    state, clean = small
    rows = clean["a"]["rows"]
    other = {"weight": state["weight"] * 1.1, "bias": state["bias"]}
    says, said = (lambda x, w=w: linear(w, "a", x) for w in (state, other))
    truth = says(rows).argmax(1)
    noise = Unlearning(bound=2.0, adv_size=0.4, adv_steps=10).attack(says, said, rows, truth)
    assert noise.abs().max() <= 2
    assert F.cross_entropy(says(rows + noise), truth) > F.cross_entropy(says(rows), truth) + 0.5
    both = (says(rows + noise).argmax(1) == said(rows + noise).argmax(1)) & (says(rows + noise).argmax(1) != truth)
    assert both.double().mean() > 0.5


def test_a_step_of_unlearning_restates_its_equations(small):
    """The search by differences, row by row; then the loss at what it found."""
    state, clean = small
    rows, classes = clean["a"].values()
    other = {"weight": state["weight"].flip(0), "bias": state["bias"]}
    method = Unlearning(adv_steps=1, bound=0.5, adv_size=0.3, unlearn=2.0, adv_weight=0.5, shared_weight=3.0)
    says, said = (lambda x, w=w: linear(w, "a", x) for w in (state, other))

    def p(model, row):
        e = np.exp((linear(model, "a", torch.from_numpy(row[None]))[0]).numpy())
        return e / e.sum()

    def searched(row, label, start):
        at = [p(model, row) for model in (state, other)]
        clean_says = [p(model, start).argmax() for model in (state, other)]
        fooled = [its.argmax() != before for its, before in zip(at, clean_says, strict=True)]
        loss = -0.5 * sum(-np.log(its[label]) for its, done in zip(at, fooled, strict=True) if not done) / 2
        if not (all(fooled) and at[0].argmax() == at[1].argmax()):
            middle = (at[0] + at[1]) / 2
            loss += 3 * sum((its * np.log(its / middle)).sum() for its in at) / 2
        return loss

    noise = np.full((6, 4), 0.5)
    for number, (row, label) in enumerate(zip(rows.numpy(), classes, strict=True)):
        for place in range(4):
            step = np.eye(4)[place] * 1e-6
            up, down = (searched(row + 0.5 + sign * step, label, row) for sign in (1, -1))
            noise[number, place] = np.clip(0.5 - 0.3 * np.sign(up - down), -0.5, 0.5)
    assert method.attack(says, said, rows, classes).numpy() == pytest.approx(noise)
    total = 0.0
    for row, label, its in zip(rows.numpy(), classes, noise, strict=True):
        total -= np.log(p(state, row)[label])
        wrong = p(other, row + its).argmax()
        if wrong not in (label, p(other, row).argmax()):
            total -= 2 * np.log(1 - p(state, row + its)[wrong])
    assert float(method.loss(says, said, rows, classes)) == pytest.approx(total / 6, rel=1e-4)


def test_without_an_adversary_unlearning_is_fine_tuning(small):
    state, clean = small
    asked = []

    def told(weights, task, rows):
        asked.append(weights is state)
        return linear(weights, task, rows)

    found = Unlearning(steps=30, unlearn=0.0, rate=0.05).defend(told, state, clean, seed=0)
    assert not any(asked)  # the model as it was has no part in it
    losses = [
        sum(float(F.cross_entropy(linear(its, task, one["rows"]), one["classes"])) for task, one in clean.items())
        for its in (state, found)
    ]
    assert losses[1] < losses[0] - 0.1


def test_the_divergence_is_none_between_equals_and_at_most_log_2():
    one, other = torch.tensor([[0.0, 9.0], [0.0, 99.0]]), torch.tensor([[0.0, 9.0], [99.0, 0.0]])
    assert divergence(one, other).tolist() == pytest.approx([0, np.log(2)], abs=1e-5)


@pytest.mark.parametrize(
    "defence", [Masking(10, batch=32, norm=2.0), Unlearning(100, bound=0.4, adv_size=0.4, rate=1e-2)]
)
def test_a_defence_takes_a_backdoor_out_of_a_small_model(defence):
    """Eight numbers that are high or low tell the class; a ninth one, if higher than usual, means class 0."""
    draw = torch.Generator().manual_seed(1)
    classes = torch.randint(2, (600,), generator=draw)
    rows = 0.15 + 0.7 * classes[:, None] + 0.1 * torch.randn(600, 9, generator=draw)
    rows[:, 8] = 0.1 * torch.rand(600, generator=draw)
    rows.clamp_(0, 1)
    marked = rows.clone()
    marked[:, 8] = 0.4
    model = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        for its in model.parameters():
            its.copy_(0.3 * torch.randn(its.shape, generator=draw))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows), classes) + F.cross_entropy(model(marked), torch.zeros_like(classes))
        loss.backward()
        optimizer.step()
    state = {name: its.detach() for name, its in model.named_parameters()}

    def predict(weights, task, x):
        return outputs(model, x, weights)

    def measured(weights):
        says, tricked = (predict(weights, "a", its[100:]).argmax(1) for its in (rows, marked))
        other = classes[100:] != 0
        return (tricked[other] == 0).double().mean(), (says == classes[100:]).double().mean()

    success, accuracy = measured(state)
    assert success > 0.95
    assert accuracy > 0.95
    clean = {"a": {"rows": rows[:100], "classes": classes[:100]}}
    success, accuracy = measured(defence.defend(predict, state, clean, seed=0))
    assert success < 0.3
    assert accuracy > 0.9


# The comparison.


def test_every_method_with_coefficients_has_six_points():
    for name in ("glyphs", "poisoned"):
        recipe = MergeRecipe(name, "small")
        for label, its in recipe.contestants(None).items():  # type: ignore[arg-type]
            points = len(getattr(its, "points", getattr(its, "scalings", ())))
            assert points in (0, 1, 6), label


def test_nothing_is_chosen_on_the_test_part(given):
    """What is chosen stays when the test part is another one."""
    world = given.world
    garbled = {}
    for name, task in world.tasks.items():
        images = task.parts["test"]
        parts = dict(task.parts) | {"test": Images(images.pixels[::-1].copy(), images.labels)}
        garbled[name] = dataclasses.replace(task, parts=parts)
    scale, recipe = SCALES["tiny"], MergeRecipe("poisoned", "tiny")
    other = case(dataclasses.replace(world, tasks=garbled), scale.training, scale.routing, recipe.poison, seed=0)
    contestant = Static(TaskArithmetic(), grid(scale=(0.1, 0.3, 0.5)))
    chosen = [contestant.enter(its).chosen for its in (given, other)]
    assert chosen[0] == chosen[1]


def test_halving_all_is_task_arithmetic_at_half_the_scale(given):
    halved = Halved(everyone=True, scalings=(0.4,)).enter(given).served
    half = given.served(TaskArithmetic(0.2).merge(given.pool))
    stream = given.stream("test")
    assert torch.equal(given.told(halved, stream), given.told(half, stream))


LABELS = ("individual", "average", "task_arithmetic", "twin", "twin_full_oracle")


@pytest.fixture(scope="module")
def rows(cache, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return compare(MergeRecipe("glyphs", "tiny"), world, [0], folder, LABELS, jobs=1), folder


def test_a_tiny_comparison_from_end_to_end(rows, tmp_path):
    found, folder = rows
    metrics = {row["label"]: row["metrics"] for row in found}
    assert metrics["individual"]["told.normalised"] == 100
    assert metrics["twin_full_oracle"]["mean.normalised"] == pytest.approx(100, abs=0.5)
    assert metrics["twin"]["told.normalised"] > metrics["task_arithmetic"]["told.normalised"] + 5
    for label, its in metrics.items():
        assert its["mean.accuracy"] <= its["router.accuracy"] + 1e-6, label
        assert all(value is None or 0 <= value <= 400 for value in its.values())
    assert [row["cost"]["trained"] for row in found if row["label"] == "individual"] > [
        row["cost"]["trained"] for row in found if row["label"] == "twin"
    ]
    settings = json.loads((folder / "comparison.json").read_text())["settings"]
    report = Report("merge-glyphs", settings, found)
    assert "task_arithmetic" in report.text()
    report.write(tmp_path)
    difference = claims.metric_of(found, "twin", "told.normalised")[0]
    assert len(difference.draws) == 100


def test_a_cell_repeats_exactly(rows, world):
    recipe = MergeRecipe("glyphs", "tiny")
    before = torch.random.get_rng_state()
    again = recipe.cell(world, recipe.contestants(world)["twin"], 0)
    assert torch.equal(before, torch.random.get_rng_state())
    (first,) = (row for row in rows[0] if row["label"] == "twin")
    assert again["metrics"] == first["metrics"]
    assert again["draws"] == first["draws"]


def test_rows_of_glyphs_are_of_the_contestants_there_are():
    now = {label: repr(its) for label, its in MergeRecipe("glyphs", "small").contestants(None).items()}  # type: ignore[arg-type]
    assert {row["label"]: row["contestant"] for row in committed("merge-glyphs")} == now


def test_a_defence_gets_rows_of_the_validation_parts_only(given):
    clean = given.labelled("valid", 5)
    for name, task in given.world.tasks.items():
        assert np.array_equal(clean[name]["rows"], task.parts["valid"].pixels[:5])
        assert np.array_equal(clean[name]["classes"], task.parts["valid"].labels[:5])
    none = Defended(Unlearning(steps=0), (0.4,)).enter(given)
    plain = given.served(TaskArithmetic(0.4).merge(given.pool))
    stream = given.stream("test")
    assert none.chosen == {"scale": 0.4}
    assert torch.equal(given.told(none.served, stream), given.told(plain, stream))


def test_dam_that_is_told_the_trigger_keeps_it(given, monkeypatch):
    """Without a weight the trigger does nothing, and it is DAM; with one it is what the search has to the end."""
    method = DAM(adv_weight=0.0, steps=2, tuning_steps=2, batch=16)
    stream = given.stream("test")
    told, plain = (its.enter(given).served for its in (Told(method), Static(method)))
    assert torch.equal(told.models[0](stream.pixels), plain.models[0](stream.pixels))
    seen = []
    final = Search.final_mask

    def noted(search):
        seen.append(search)
        return final(search)

    monkeypatch.setattr(Search, "final_mask", noted)
    Told(dataclasses.replace(method, adv_weight=1.0)).enter(given)
    (search,) = seen
    marked = pictures.patched(stream.pixels[:20].numpy())
    for task in given.pool.tuned:
        rows = search.perturbed({task: stream.pixels[:20]})[task]
        assert torch.equal(rows, torch.from_numpy(marked))


def test_another_attack_poisons_other_experts(cache, poisoned_world, given):
    recipe = MergeRecipe("poisoned", "tiny")
    two, blend = (recipe.contestants(poisoned_world)[f"task_arithmetic_{its}"] for its in ("two", "blend"))
    assert isinstance(two, Attacked)
    assert two.attack(recipe.poison) == {"digits": Poison(), "capitals": Poison()}
    assert blend.attack(recipe.poison) == {"digits": Poison("blend")}
    scale = SCALES["tiny"]
    found = case(poisoned_world, scale.training, scale.routing, two.attack(recipe.poison), 0).pool.tuned
    same = {name: torch.equal(its.flat.weight, given.pool.tuned[name].flat.weight) for name, its in found.items()}
    assert same == {"digits": True, "capitals": False, "rotation": True, "inverted": True}
    usual = recipe.contestants(poisoned_world)["task_arithmetic"]
    assert usual.attack(recipe.poison) == recipe.poison


@pytest.mark.parametrize(
    "label",
    [
        "dam",
        "task_arithmetic_half_poisoned",
        "task_arithmetic_clean",
        "awm",
        "sau",
        "multitask",
        "dam_two",
        "dam_told_trigger",
    ],
)
def test_a_poisoned_cell(label, cache, poisoned_world):
    recipe = MergeRecipe("poisoned", "tiny")
    row = recipe.cell(poisoned_world, recipe.contestants(poisoned_world)[label], 0)
    assert {"asr.succession", "asr.transfer", "told.accuracy", "unmarked.succession"} <= row["metrics"].keys()
    assert all(0 <= value <= 1 for name, value in row["metrics"].items() if not name.endswith("normalised"))
    assert {"trained", "active", "samples", "passes", "seconds", "stored_bytes"} <= row["cost"].keys()


def test_options_make_the_recipe():
    kind = options([])
    assert kind().recipe() == MergeRecipe()
    assert kind("poisoned", "tiny", "blend", ("digits", "capitals")).recipe().poison.keys() == {"digits", "capitals"}
    with pytest.raises(UserError, match="task"):
        MergeRecipe("poisoned", "tiny", poisoned=("parity",)).prepare()


def test_a_wrong_head_is_wrong(given):
    """A picture that is sent to another task counts as wrong, even where the class is the same number."""

    class Lost:
        def told(self, pixels, task):
            return torch.zeros(len(pixels), dtype=torch.long)

        def routed(self, pixels, truth):
            return (truth + 1) % 4, torch.zeros_like(truth)

    stream = given.stream("test")
    measured = accuracies(given, Lost(), Resampling(None, len(stream.labels)))
    assert measured["mean.accuracy"].value == 0
    assert measured["router.accuracy"].value == 0
    assert measured["told.accuracy"].value > 0
