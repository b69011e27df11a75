"""Claims are evaluated from committed rows; rows that no longer belong to the code fail here."""

import json

import pytest

from koinon.bench.claims import RESULTS, committed, verdicts
from koinon.core import names
from koinon.recipes.share import ShareRecipe
from koinon.systems import SYSTEMS

CLAIMS = [claim for system in SYSTEMS for claim in system.claims]
RECIPES = sorted({claim.recipe for claim in CLAIMS})


def test_there_are_81_systems_in_order():
    assert [system.number for system in SYSTEMS] == list(range(1, 82))
    assert len({system.url for system in SYSTEMS}) == 81
    assert all(system.url.startswith("https://") for system in SYSTEMS)


def test_methods_of_systems_exist_and_only_they_have_claims():
    for system in SYSTEMS:
        assert set(system.methods) <= set(names())
        assert system.methods or not system.claims


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_claim_can_be_evaluated_from_committed_rows(recipe):
    rows = committed(recipe)
    for claim in CLAIMS:
        if claim.recipe == recipe:
            for label in (claim.better, claim.than):
                seeds = {row["seed"] for row in rows if row["label"] == label}
                assert len(seeds) >= 5, f"{recipe}: {label} has {len(seeds)} seeds, five are asked for"


def test_a_claim_that_does_not_hold_says_why():
    for system in SYSTEMS:
        for verdict in verdicts(system):
            assert verdict.state != "untested", verdict.claim
            if verdict.state == "not held":
                assert len(verdict.claim.why) > 20, f"{verdict.claim.says} ({verdict.claim.recipe}): no reason given"


@pytest.mark.parametrize("recipe", RECIPES)
def test_committed_rows_are_of_one_comparison(recipe):
    rows = committed(recipe)
    for label in {row["label"] for row in rows}:
        assert len({row["contestant"] for row in rows if row["label"] == label}) == 1
    assert len({json.dumps(row["versions"], sort_keys=True) for row in rows}) == 1
    assert len({row["git"] for row in rows}) == 1
    assert not any(row["git"].endswith("+") for row in rows), "rows come from files that were not committed"


def test_committed_rows_belong_to_the_code():
    """The made data need no download: their settings and contestants must be what the code has now."""
    recipe = ShareRecipe("related", "small")
    world = recipe.prepare()
    held = json.loads((RESULTS / "share-related.settings.json").read_text(encoding="utf-8"))
    assert held == json.loads(json.dumps(recipe.settings(world)))
    now = {label: repr(contestant) for label, contestant in recipe.contestants(world).items()}
    assert {row["label"]: row["contestant"] for row in committed("share-related")} == now
    movielens = {row["label"]: row["contestant"] for row in committed("share-movielens")}
    assert movielens.keys() == now.keys()
    assert movielens["home"] == now["home"]
    assert movielens["trees"] == now["trees"]
