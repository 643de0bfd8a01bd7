"""The one name under which all metrics are found."""

from maskgit.evaluation import metrics
from maskgit.evaluation.metrics import distributions, fidelity, frechet, intervals, manifolds

# What other modules of the package share.
HELPERS = {"batch_mask", "masked_mean"}


def test_every_metric_has_the_one_name():
    for module in (distributions, fidelity, frechet, intervals, manifolds):
        own = {
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__
        }
        for name in {name for name in own if name[0] != "_"} - HELPERS:
            assert getattr(metrics, name) is vars(module)[name]
            assert name in metrics.__all__
