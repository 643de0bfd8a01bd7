"""How good images, reconstructions, codes and edits are: pure functions of arrays, under one name.

Long sums are float64. Images are float tensors (B, 3, H, W) in [0, 1]; features, counts and statistics are
NumPy arrays.
"""

from maskgit.evaluation.metrics.distributions import (
    CMMD,
    InceptionScore,
    KernelDistance,
    cmmd,
    codebook_usage,
    inception_score,
    kernel_distance,
    perplexity,
)
from maskgit.evaluation.metrics.fidelity import (
    SSIM_WINDOW,
    boundary_gradient_ratio,
    psnr,
    ssim,
)
from maskgit.evaluation.metrics.frechet import (
    FeatureStatistics,
    FrechetReport,
    Gaussian,
    frechet_distance,
    frechet_report,
    symmetric_root,
)
from maskgit.evaluation.metrics.intervals import (
    Interval,
    bootstrap_interval,
    jackknife_interval,
    mean_interval,
    share_interval,
    splits_interval,
    student_quantile,
    wilson_interval,
)
from maskgit.evaluation.metrics.manifolds import (
    DensityCoverage,
    Manifolds,
    ManifoldScores,
    PrecisionRecall,
    authenticity,
    density_coverage,
    precision_recall,
)
from maskgit.evaluation.metrics.probe import LinearProbe
from maskgit.evaluation.metrics.vectors import Floats, as_doubles, as_vectors

__all__ = [
    "CMMD",
    "SSIM_WINDOW",
    "DensityCoverage",
    "FeatureStatistics",
    "Floats",
    "FrechetReport",
    "Gaussian",
    "InceptionScore",
    "Interval",
    "KernelDistance",
    "LinearProbe",
    "ManifoldScores",
    "Manifolds",
    "PrecisionRecall",
    "as_doubles",
    "as_vectors",
    "authenticity",
    "bootstrap_interval",
    "boundary_gradient_ratio",
    "cmmd",
    "codebook_usage",
    "density_coverage",
    "frechet_distance",
    "frechet_report",
    "inception_score",
    "jackknife_interval",
    "kernel_distance",
    "mean_interval",
    "perplexity",
    "precision_recall",
    "psnr",
    "share_interval",
    "splits_interval",
    "ssim",
    "student_quantile",
    "symmetric_root",
    "wilson_interval",
]
