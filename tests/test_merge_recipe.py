"""Merging compared: the pictures, the poison, the cache of experts, and a tiny comparison from end to end."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from koinon.bench import claims
from koinon.bench.compare import compare
from koinon.bench.report import Report
from koinon.bench.statistics import Resampling
from koinon.core import UserError
from koinon.data import glyphs as pictures
from koinon.data.glyphs import CHARACTERS, PARTS, Images, glyphs, patched, poisoned, usable_fonts
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.recipes._contestants import Case, Halved, Static, case, grid, headed
from koinon.recipes._vision import PatchNet, Training, experts
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
    found = {name: backdoor(given, its, poison, "patch", resampling) for name, its in (("0", zero), ("right", right))}
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


@pytest.mark.parametrize("label", ["dam", "task_arithmetic_half_poisoned", "task_arithmetic_clean"])
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
