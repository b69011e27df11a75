"""Metrics against their definitions, intervals against what is known, verdicts on made rows."""

import gzip
import json
import math
import warnings

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from koinon.bench.claims import committed, evaluate, metric_of, read_rows, state_of
from koinon.bench.statistics import DRAWS, Interval, Measured, Resampling, interval, mean_of, paired
from koinon.systems import Claim, System

ROWS = 300
NAN = float("nan")


def scored(seed: int = 0, ties: bool = True, missing: bool = True):
    """Labels, scores with many ties, and a group for each row."""
    rng = np.random.default_rng(seed)
    groups = rng.choice([7, 3, 11, 20, 5, 1, 40], ROWS)
    labels = (rng.random(ROWS) < 0.3).astype(float)
    scores = rng.normal(size=ROWS) + 0.7 * labels
    if ties:
        scores = np.round(scores, 1)
    if missing:
        labels[rng.random(ROWS) < 0.1] = np.nan
    return labels, scores, groups.astype(np.int64)


def with_counts(groups, counts) -> Resampling:
    """A resampling whose counts are given: how often each group is in it, by the order of the groups' codes."""
    resampling = Resampling(groups, len(groups), draws=0)
    units = resampling.counts.shape[1]
    resampling.counts = np.concatenate([np.ones((1, units)), np.asarray(counts, float)])
    return resampling


def counts_of(groups, draws: int = 6) -> np.ndarray:
    units = len(np.unique(groups))
    return np.random.default_rng(5).integers(0, 4, size=(draws, units)) + (np.arange(units) == 0)


# Metrics.


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_auc_is_sklearns(seed, ties):
    """With ties, missing labels left out, and each resampling as weights of its groups' rows."""
    labels, scores, groups = scored(seed, ties)
    counts = counts_of(groups)
    found = with_counts(groups, counts).auc(labels, scores)
    known = ~np.isnan(labels)
    codes = np.unique(groups, return_inverse=True)[1]
    assert found.value == pytest.approx(roc_auc_score(labels[known], scores[known]), rel=1e-12)
    assert len(found.draws) == len(counts)
    for draw, count in zip(found.draws, counts, strict=True):
        weight = count[codes][known]
        assert draw == pytest.approx(roc_auc_score(labels[known], scores[known], sample_weight=weight), rel=1e-12)


def test_auc_of_scores_that_say_nothing_or_everything():
    """All tied is a half; sorted is 1; reversed is 0."""
    labels = np.array([0.0, 1, 0, 1])
    resampling = Resampling(None, 4, draws=0)
    assert resampling.auc(labels, np.zeros(4)).value == 0.5
    assert resampling.auc(labels, labels).value == 1.0
    assert resampling.auc(labels, -labels).value == 0.0


def test_auc_without_groups_resamples_rows():
    """Each row is a group of its own."""
    labels, scores, _ = scored(missing=False)
    resampling = Resampling(None, ROWS, draws=5, seed=3)
    assert resampling.counts.shape == (6, ROWS)
    for draw, count in zip(resampling.auc(labels, scores).draws, resampling.counts[1:], strict=True):
        assert draw == pytest.approx(roc_auc_score(labels, scores, sample_weight=count), rel=1e-12)


def test_a_resampling_with_one_class_has_no_auc():
    """NaN and nothing worse: an interval leaves it out."""
    labels, scores, groups = np.array([0.0, 1, 0, 1]), np.array([1.0, 2, 3, 4]), np.array([0, 0, 1, 2])
    found = with_counts(groups, [[0, 1, 0], [1, 1, 1]]).auc(labels, scores)
    assert math.isnan(found.draws[0])
    assert found.draws[1] == found.value == 0.75


def test_auc_in_chunks_is_auc_at_once(monkeypatch):
    """Many resamplings are worked off in parts to save memory; that shows in no number."""
    labels, scores, groups = scored()
    resampling = Resampling(groups, ROWS, draws=40)
    whole = resampling.auc(labels, scores)
    parts = []
    split = np.array_split
    monkeypatch.setattr(np, "array_split", lambda table, _parts: parts.append(split(table, 7)) or parts[0])
    cut = resampling.auc(labels, scores)
    assert [len(part) for part in parts[0]] == [6, 6, 6, 6, 6, 6, 5]
    assert cut.value == whole.value
    assert np.array_equal(cut.draws, whole.draws)


def naive_gauc(labels, scores, groups, count) -> tuple[float, float]:
    """Group by group: AUC weighted by known rows, times how often the group was drawn; and the covered share."""
    total = weight = covered = known_rows = 0.0
    for place, group in enumerate(np.unique(groups)):
        its = (groups == group) & ~np.isnan(labels)
        known_rows += its.sum()
        if len(set(labels[its])) < 2:
            continue
        covered += its.sum()
        total += count[place] * its.sum() * roc_auc_score(labels[its], scores[its])
        weight += count[place] * its.sum()
    return total / weight, covered / known_rows


@pytest.mark.parametrize("ties", [True, False])
def test_gauc_is_the_loop_over_groups(ties):
    """Groups of one class are left out, and the coverage says so."""
    labels, scores, groups = scored(ties=ties)
    labels[groups == 7] = 1.0
    labels[groups == 40] = np.nan
    counts = counts_of(groups)
    found, coverage = with_counts(groups, counts).gauc(labels, scores)
    value, share = naive_gauc(labels, scores, groups, np.ones(counts.shape[1]))
    assert found.value == pytest.approx(value, rel=1e-12)
    assert coverage == pytest.approx(share, rel=1e-12)
    assert 0.5 < coverage < 1
    for draw, count in zip(found.draws, counts, strict=True):
        assert draw == pytest.approx(naive_gauc(labels, scores, groups, count)[0], rel=1e-12)


def test_gauc_sees_no_difference_between_groups():
    """A constant added to one group's scores changes AUC and not GAUC."""
    labels, scores, groups = scored(missing=False)
    resampling = Resampling(groups, ROWS, draws=0)
    moved = scores + 100 * (groups == 3)
    assert resampling.gauc(labels, moved)[0].value == resampling.gauc(labels, scores)[0].value
    assert resampling.auc(labels, moved).value != resampling.auc(labels, scores).value


def test_gauc_where_no_group_has_both_classes():
    labels = np.array([0.0, 0, 1, 1])
    found, coverage = Resampling(np.array([0, 0, 1, 1]), 4, draws=2).gauc(labels, labels)
    assert math.isnan(found.value)
    assert coverage == 0.0


def test_rmse_is_the_root_of_the_mean_square():
    """Over known rows, each as often as its group was drawn."""
    labels, scores, groups = scored()
    counts = counts_of(groups)
    found = with_counts(groups, counts).rmse(labels, scores)
    known = ~np.isnan(labels)
    codes = np.unique(groups, return_inverse=True)[1]
    assert found.value == pytest.approx(math.sqrt(np.mean((labels - scores)[known] ** 2)), rel=1e-12)
    for draw, count in zip(found.draws, counts, strict=True):
        repeated = np.repeat((labels - scores)[known] ** 2, count[codes][known])
        assert draw == pytest.approx(math.sqrt(repeated.mean()), rel=1e-12)


def test_mean_of_goes_resampling_by_resampling():
    found = mean_of([Measured(1.0, np.array([1.0, 2.0])), Measured(3.0, np.array([5.0, 8.0]))])
    assert found.value == 2.0
    assert found.draws.tolist() == [3.0, 5.0]


# Resamplings.


def test_resamplings_are_the_same_for_every_method():
    """What is measured on one test part is paired: equal draws for equal seeds, for every metric."""
    labels, scores, groups = scored(missing=False)
    one, other = (Resampling(groups, ROWS) for _ in range(2))
    assert one.counts.shape == (1 + DRAWS, 7)
    assert np.array_equal(one.counts, other.counts)
    assert np.array_equal(one.auc(labels, scores).draws, other.auc(labels, scores).draws)
    assert not np.array_equal(one.counts, Resampling(groups, ROWS, seed=1).counts)


def test_resamplings_draw_as_many_groups_as_there_are():
    """The test part itself comes first; then each draw counts groups with replacement."""
    _, _, groups = scored()
    counts = Resampling(groups, ROWS, draws=3000).counts
    assert (counts[0] == 1).all()
    assert (counts.sum(1) == 7).all()
    assert counts[1:].mean(0) == pytest.approx(np.ones(7), abs=0.1)
    assert counts[1:].var(0) == pytest.approx(np.full(7, 6 / 7), abs=0.1)


def test_draws_spread_as_the_metric_does():
    """The draws' standard deviation is that of the mean of independent groups."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=2000)
    draws = Resampling(None, 2000, draws=2000).rmse(np.zeros(2000), scores).draws ** 2
    assert draws.std() == pytest.approx((scores**2).std() / math.sqrt(2000), rel=0.1)


# Intervals.


def single(*values: float) -> dict[int, Measured]:
    """Seeds with a value each and no resampling."""
    return {seed: Measured(value, np.array([])) for seed, value in enumerate(values)}


def test_interval_over_seeds_alone():
    """The bootstrap of their mean: within their range, around the mean, and the same each time."""
    values = single(1.0, 2.0, 4.0, 5.0)
    found = interval(values)
    assert found.mean == 3.0
    assert 1.0 < found.low < 3.0 < found.high < 5.0
    assert found == interval(values)
    assert interval(single(2.0, 2.0, 2.0)) == Interval(2.0, 2.0, 2.0)


def test_one_seed_without_resamplings_has_no_interval():
    """NaN bounds, which are neither above nor below zero."""
    found = interval(single(2.0))
    assert found.mean == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.sign == 0


def test_what_no_seed_has_is_not_known():
    found = interval({})
    assert all(map(math.isnan, (found.mean, found.low, found.high)))
    assert found.sign == 0


def test_one_seed_with_resamplings_has_their_interval():
    draws = np.arange(1001) / 1000
    found = interval({4: Measured(0.5, draws)})
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.025, abs=0.01)
    assert found.high == pytest.approx(0.975, abs=0.01)


def test_draws_without_a_value_are_left_out():
    draws = np.where(np.arange(1000) % 10 == 0, np.nan, 1.0)
    assert interval({0: Measured(1.0, draws)}) == Interval(1.0, 1.0, 1.0)


def test_interval_covers_the_truth_as_often_as_it_says():
    """200 experiments with a known mean: the 95 % interval of 12 seeds misses it seldom, and not never."""
    rng = np.random.default_rng(1)
    missed = 0
    for seed in range(200):
        found = interval(single(*rng.normal(3.0, 1.0, 12)), times=500, seed=seed)
        missed += not found.low <= 3.0 <= found.high
    assert 4 <= missed <= 30  # 10 expected; the bootstrap of 12 values is somewhat narrow


def test_interval_holds_both_seeds_and_groups():
    """It is wider than either alone."""
    rng = np.random.default_rng(2)
    between, within = rng.normal(size=8), rng.normal(size=500)
    both = interval({s: Measured(b, b + within) for s, b in enumerate(between)})
    seeds = interval(single(*between))
    groups = interval({s: Measured(0.0, within) for s in range(8)})
    assert both.high - both.low > 1.02 * max(seeds.high - seeds.low, groups.high - groups.low)


@pytest.mark.parametrize(
    ("low", "high", "sign"),
    [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.1, 0), (0.0, 0.1, 0), (-0.1, 0.0, 0), (NAN, NAN, 0)],
)
def test_sign_is_zero_where_the_interval_holds_zero(low, high, sign):
    assert Interval(0.0, low, high).sign == sign


def test_paired_differences_cancel_what_is_common():
    """Two methods that differ by exactly 0.01 on every resampling differ by 0.01 with no width, however both vary."""
    rng = np.random.default_rng(3)
    one = {s: Measured(v, v + rng.normal(size=50)) for s, v in enumerate(rng.normal(size=5))}
    other = {s: Measured(m.value - 0.01, m.draws - 0.01) for s, m in one.items()}
    found = paired(one, other)
    assert [found.mean, found.low, found.high] == pytest.approx([0.01] * 3, abs=1e-12)
    assert found.sign == 1
    assert paired(other, one).sign == -1
    assert paired(one, one) == Interval(0.0, 0.0, 0.0)


def test_paired_takes_the_seeds_both_have():
    found = paired(
        {0: Measured(5.0, np.array([])), **single(1.0, 2.0, 3.0)}, {1: Measured(1.0, np.array([])), 9: single(7.0)[0]}
    )
    assert found.mean == 1.0  # seed 1 alone
    assert math.isnan(found.low)


# Verdicts.


def row(label: str, seed: int, value: float, draws=(), meter: float = 0.0) -> dict:
    return {
        "label": label,
        "seed": seed,
        "metrics": {"mean.auc": value},
        "draws": {"mean.auc": list(draws)} if len(draws) else {},
        "meters": {"collapse": meter},
    }


def claim(**more) -> Claim:
    return Claim(**{"says": "one beats other", "recipe": "share-made", "better": "one", "than": "other",
                    "metric": "mean.auc", **more})  # fmt: skip


def rows_of(one: list[float], other: list[float]) -> list[dict]:
    """A row for each label and seed, its resamplings a little around it and common to both."""
    noise = np.random.default_rng(0).normal(0, 0.05, 40)
    pairs = [*(("one", s, v) for s, v in enumerate(one)), *(("other", s, v) for s, v in enumerate(other))]
    return [row(label, seed, value, value + noise, meter=1 - value) for label, seed, value in pairs]


def test_a_claim_is_held_if_the_interval_is_above_zero():
    verdict = evaluate(claim(), rows_of([0.71, 0.72, 0.73], [0.70, 0.70, 0.71]))
    assert verdict.state == "held"
    assert verdict.difference.mean == pytest.approx(0.05 / 3)
    assert verdict.difference.low > 0


@pytest.mark.parametrize("one", [[0.70, 0.69, 0.72], [0.60, 0.61, 0.62], [0.70, 0.70, 0.71]])
def test_a_claim_is_not_held_if_the_interval_touches_zero(one):
    """By a mixed result, a clear loss, or no difference at all."""
    verdict = evaluate(claim(), rows_of(one, [0.70, 0.70, 0.71]))
    assert verdict.state == "not held"
    assert verdict.difference.low <= 0


@pytest.mark.parametrize(
    ("one", "other"), [([], []), ([0.9], [0.1]), ([0.9, 0.9, 0.9], [0.1]), ([0.9, 0.9], [])], ids=str
)
def test_a_claim_is_untested_below_two_common_seeds(one, other):
    verdict = evaluate(claim(), rows_of(one, other))
    assert verdict.state == "untested"
    assert verdict.difference is None


def test_a_claim_on_an_absent_metric_is_untested():
    assert evaluate(claim(metric="mean.gauc"), rows_of([0.9] * 3, [0.1] * 3)).state == "untested"
    assert evaluate(claim(), []).state == "untested"


def test_where_less_is_better_the_difference_is_turned():
    """What is smaller wins; a meter is a metric without resamplings."""
    rows = rows_of([0.71, 0.72, 0.73], [0.70, 0.70, 0.71])
    meter = evaluate(claim(metric="collapse"), rows)  # 1 minus the metric
    assert meter.state == "held"
    assert meter.difference.mean == pytest.approx(0.05 / 3)
    turned = evaluate(claim(metric="collapse", better="other", than="one"), rows)
    assert turned.state == "not held"
    assert turned.difference.mean == pytest.approx(-0.05 / 3)


def test_a_claim_may_say_by_how_much():
    """On the claimed side of zero is not enough: as far from it as the paper says."""
    rows = rows_of([0.71, 0.72, 0.73], [0.40, 0.40, 0.41])
    assert evaluate(claim(by=0.3), rows).state == "held"
    far = evaluate(claim(by=0.33), rows)
    assert far.state == "not held"
    assert far.difference.mean == pytest.approx(0.95 / 3 - 0.33)
    half = evaluate(claim(metric="collapse", times=0.5), rows)  # 0.28 on the mean, of 0.60
    assert half.state == "held"
    assert half.difference.mean == pytest.approx((0.5 * 1.79 - 0.84) / 3)
    assert evaluate(claim(metric="collapse", times=0.4), rows).state == "not held"
    assert evaluate(claim(metric="collapse", by=0.2), rows).state == "held"
    assert evaluate(claim(metric="collapse", by=0.32), rows).state == "not held"


def test_metric_of_finds_metrics_and_meters_of_one_label():
    rows = rows_of([0.7, 0.8], [0.1])
    found = metric_of(rows, "one", "mean.auc")
    assert {seed: measured.value for seed, measured in found.items()} == {0: 0.7, 1: 0.8}
    assert len(found[0].draws) == 40
    assert len(metric_of(rows, "one", "collapse")[0].draws) == 0
    assert metric_of(rows, "absent", "mean.auc") == metric_of(rows, "one", "absent") == {}


def test_rows_are_read_from_json_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert read_rows(file) == [{"a": 1}, {"a": 2}]
    packed = tmp_path / "packed.jsonl"
    packed.with_name("packed.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert read_rows(packed) == [{"a": 1}, {"a": 2}]
    assert committed("no-such-comparison") == []


def test_state_of_a_system_counts_its_claims(tmp_path, monkeypatch):
    """Absent without methods, untested without rows, otherwise what the committed rows say."""
    system = System(
        1,
        "t",
        2000,
        "u",
        "share",
        ("share.mmoe",),
        (claim(), claim(better="other", than="one"), claim(metric="absent")),
    )
    assert state_of(System(1, "t", 2000, "u", "share")) == "absent"
    assert state_of(System(1, "t", 2000, "u", "share", ("share.mmoe",))) == "no claims"
    assert state_of(system) == "3 untested"
    rows = rows_of([0.71, 0.72, 0.73], [0.70, 0.70, 0.71])
    (tmp_path / "share-made.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr("koinon.bench.claims.RESULTS", tmp_path)
    assert state_of(system) == "1 held, 1 not held, 1 untested"


def test_a_metric_that_is_not_there_has_no_interval_and_no_warning():
    missing = Measured(float("nan"), np.full(5, np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = interval({0: missing, 1: missing})
    assert np.isnan([found.mean, found.low, found.high]).all()
