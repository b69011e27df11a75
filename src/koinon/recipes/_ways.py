"""The ways of making one model of all that every comparison of merging enters, and the points they choose from."""

from koinon.merge.adamerging import AdaMerging
from koinon.merge.average import Average
from koinon.merge.breadcrumbs import Breadcrumbs
from koinon.merge.dare import Dare
from koinon.merge.fisher import Fisher
from koinon.merge.regmean import RegMean
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.ties import Ties
from koinon.recipes._contestants import Contestant, Individual, Static, Unmerged, grid

SCALINGS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""lambda to choose from: as many points as every other method has."""


def static(steps: int) -> dict[str, Contestant]:
    """Ways to make one model of all, and what bounds them, each with six points to choose from if it has settings."""
    return {
        "individual": Individual(),
        "base": Unmerged(),
        "average": Static(Average()),
        "task_arithmetic": Static(TaskArithmetic(), grid(scale=SCALINGS)),
        "ties": Static(Ties(), grid(density=((0.2,), (0.8,)), scale=(0.7, 1.0, 1.5))),
        "dare": Static(Dare(), grid(density=((0.2,), (0.8,)), scale=(0.2, 0.3, 0.5))),
        "dare_ties": Static(Dare(elect=True, mean=True), grid(density=((0.2,), (0.8,)), scale=(0.3, 0.6, 1.0))),
        "breadcrumbs": Static(Breadcrumbs(), grid(density=(0.2, 0.8), scale=(0.2, 0.4, 0.7))),
        "fisher": Static(Fisher(sampled=True), grid(floor=(1e-8, 1e-6, 1e-4), normalize=(False, True))),
        "regmean": Static(RegMean(), grid(shrink=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0))),
        "adamerging": Static(AdaMerging(steps=steps, batch=64), grid(init=SCALINGS)),
    }
