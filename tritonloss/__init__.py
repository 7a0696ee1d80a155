"""Exact, stable, fused losses for training object detectors."""

from . import _checkout  # noqa: F401, I001  (first: where the kernels are)
from . import functional
from ._dispatch import backend, show_config
from ._version import __version__
from .diagnose import Diagnosis, Report
from .distributed import reduce_avg_factor
from .functional import *  # noqa: F403  (the names of functional.__all__)
from .modules import (
    ALRPLoss,
    APLoss,
    AsymmetricLoss,
    BCELoss,
    CARLLoss,
    CIoULoss,
    DIoULoss,
    DistributionDistillationLoss,
    DistributionFocalLoss,
    EIoULoss,
    FocalLoss,
    FocalStarLoss,
    GaussianFocalLoss,
    GHMCLoss,
    GHMRLoss,
    GIoULoss,
    Integral,
    IoUAwareBCELoss,
    IoULoss,
    MALLoss,
    QualityFocalLoss,
    RankSortLoss,
    SoftmaxFocalLoss,
    VarifocalLoss,
)
from .set_criterion import SetCriterion

__all__ = [
    "ALRPLoss",
    "APLoss",
    "AsymmetricLoss",
    "BCELoss",
    "CARLLoss",
    "CIoULoss",
    "DIoULoss",
    "Diagnosis",
    "DistributionDistillationLoss",
    "DistributionFocalLoss",
    "EIoULoss",
    "FocalLoss",
    "FocalStarLoss",
    "GHMCLoss",
    "GHMRLoss",
    "GIoULoss",
    "GaussianFocalLoss",
    "Integral",
    "IoUAwareBCELoss",
    "IoULoss",
    "MALLoss",
    "QualityFocalLoss",
    "RankSortLoss",
    "Report",
    "SetCriterion",
    "SoftmaxFocalLoss",
    "VarifocalLoss",
    "__version__",
    "backend",
    "functional",
    "reduce_avg_factor",
    "show_config",
]
__all__ += functional.__all__


def __dir__() -> list[str]:
    return sorted(__all__)
