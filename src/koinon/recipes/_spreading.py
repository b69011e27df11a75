"""What learning texts did to their own keywords and to others' places, as metrics with resamplings."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from koinon.bench.statistics import Array, Measured, Resampling
from koinon.core import pick
from koinon.edit._priming import Foreseen
from koinon.recipes._teaching import Outcome

MAIN = "specificity"
SHOWN = ("memory", "priming", "diluted", "kept", "held", "spearman", "foretold")
"""Metrics to rank by, and to show beside it."""
RARE = float(np.log(1e-8))
"""Under this log-probability a quotient tells more of its denominator than of learning."""
PREDICTORS = ("probability", "loss", "length", "entropy")
Texts = NDArray[np.int64]
"""Which texts a statistic is of, by their numbers; some repeatedly."""


def measure(
    found: Sequence[Outcome],
    plain: Sequence[Outcome],
    foreseen: Sequence[Foreseen],
    predictor: str,
    words: Sequence[str],
) -> dict[str, Measured]:
    """What learning each text did, over all texts; resamplings are of whole keywords, which ``words`` are.

    ==============  ==========================================================================================
    memory          median of log S_mem
    priming         median of log S_prime, where a text's thematic prefixes are averaged as logarithms
    specificity     median of log S_mem - log S_prime: how much more the text's own place gained than others
    diluted         median of how much smaller log S_prime is than after plain fine-tuning
    reduction       by how many per cent the median log S_prime is smaller than plain fine-tuning's
    kept            share of texts whose S_mem is at least 80 % of plain fine-tuning's
    held            mean rise of the loss on other texts
    spearman        rank correlation of the predictor with log S_prime
    foretold        its size
    raised          share of texts whose stepping stones made the keyword likelier, and were used
    ==============  ==========================================================================================

    ``spearman.likely`` leaves out keywords under 1e-8, ``spearman.change`` is that with P_after - P_before in the place
    of log S_prime. ``.change`` and ``.ratio`` of memory and priming are means of differences, and of quotients as the
    paper has them.
    """
    codes = np.unique(np.array(words), return_inverse=True)[1]
    resampling = Resampling(codes, len(codes))

    def of(outcomes: Sequence[Outcome], name: str) -> Array:
        return np.array([getattr(its.scores, name) for its in outcomes], dtype=float)

    memory, priming, usual = of(found, "memory"), of(found, "priming"), of(plain, "priming")
    known = {"probability": "logprob"} | {name: name for name in PREDICTORS[1:]}
    field = known[pick(predictor, PREDICTORS, "predictor")]
    seen = np.array([getattr(its, field) for its in foreseen], dtype=float)
    likely = np.array([its.logprob for its in foreseen]) >= RARE
    means = {
        "kept": (memory >= of(plain, "memory") + np.log(0.8)).astype(float),
        "held": np.array([its.held for its in found]),
        "raised": np.array([its.raised for its in found], dtype=float),
    } | {f"{what}.{how}": of(found, f"{what}_{how}") for what in ("memory", "priming") for how in ("change", "ratio")}
    medians = {"memory": memory, "priming": priming, "specificity": memory - priming, "diluted": usual - priming}
    values: dict[str, Callable[[Texts], float]] = {
        "reduction": lambda texts: percent(float(np.median(priming[texts])), float(np.median(usual[texts]))),
        "spearman": lambda texts: spearman(seen[texts], priming[texts]),
        "spearman.likely": lambda texts: spearman(seen[texts[likely[texts]]], priming[texts[likely[texts]]]),
        "spearman.change": lambda texts: spearman(seen[texts], means["priming.change"][texts]),
        "foretold": lambda texts: abs(spearman(seen[texts], priming[texts])),
    }
    measured = {name: over_texts(value, resampling) for name, value in values.items()}
    for kind, arrays in ((np.median, medians), (np.mean, means)):
        measured |= {name: over_texts(_of(kind, its), resampling) for name, its in arrays.items()}
    return measured


def _of(kind: Callable[[Array], np.floating], values: Array) -> Callable[[Texts], float]:
    return lambda texts: float(kind(values[texts]))


def over_texts(value: Callable[[Texts], float], resampling: Resampling) -> Measured:
    """A statistic of the texts, and of each resampling of them."""
    counts = resampling.counts[:, resampling.codes].astype(int)
    return resampling.measured(np.array([value(np.repeat(np.arange(len(its)), its)) for its in counts]))


def spearman(one: Array, other: Array) -> float:
    """Rank correlation, equal values sharing the mean of their ranks; 0 where there is nothing to tell apart."""
    if len(one) < 3 or one.min() == one.max() or other.min() == other.max():
        return 0.0
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Array) -> Array:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def percent(now: float, was: float) -> float:
    """How much smaller it is now; NaN where there was nothing."""
    return 100 * (1 - now / was) if was > 0 else float("nan")
