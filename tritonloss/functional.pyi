"""Written by tools/stubs.py."""

from typing import overload

from torch import Tensor
from torch.distributed import ProcessGroup

from tritonloss._levels import Levels, LevelTargets
from tritonloss.losses.boxes import ciou_loss as ciou_loss
from tritonloss.losses.boxes import diou_loss as diou_loss
from tritonloss.losses.boxes import eiou_loss as eiou_loss
from tritonloss.losses.boxes import giou_loss as giou_loss
from tritonloss.losses.boxes import iou as iou
from tritonloss.losses.boxes import iou_loss as iou_loss
from tritonloss.losses.distribution import (
    distribution_distillation_loss as distribution_distillation_loss,
)
from tritonloss.losses.distribution import distribution_expectation as distribution_expectation
from tritonloss.losses.distribution import distribution_focal_loss as distribution_focal_loss
from tritonloss.losses.matching import assign as assign
from tritonloss.losses.matching import matching_cost as matching_cost
from tritonloss.losses.pointwise import asymmetric_loss as asymmetric_loss
from tritonloss.losses.pointwise import authentic_smooth_l1_loss as authentic_smooth_l1_loss
from tritonloss.losses.pointwise import class_balanced_weight as class_balanced_weight
from tritonloss.losses.pointwise import focal_star_loss as focal_star_loss
from tritonloss.losses.pointwise import gaussian_focal_loss as gaussian_focal_loss
from tritonloss.losses.pointwise import generalized_focal_loss as generalized_focal_loss
from tritonloss.losses.pointwise import quality_focal_loss as quality_focal_loss
from tritonloss.losses.pointwise import sigmoid_focal_loss as sigmoid_focal_loss
from tritonloss.losses.pointwise import varifocal_loss as varifocal_loss
from tritonloss.losses.prime_sample import carl_loss as carl_loss
from tritonloss.losses.prime_sample import iou_hlr as iou_hlr
from tritonloss.losses.prime_sample import isr_p_weight as isr_p_weight
from tritonloss.losses.quality import bce_loss as bce_loss
from tritonloss.losses.quality import iou_aware_bce_loss as iou_aware_bce_loss
from tritonloss.losses.quality import mal_loss as mal_loss
from tritonloss.losses.ranking import ALRP as ALRP
from tritonloss.losses.ranking import RankSort as RankSort
from tritonloss.losses.ranking import alrp_loss as alrp_loss
from tritonloss.losses.ranking import ap_loss as ap_loss
from tritonloss.losses.ranking import rank_sort_loss as rank_sort_loss
from tritonloss.losses.ranking import self_balanced_weight as self_balanced_weight
from tritonloss.losses.softmax_focal import softmax_focal_loss as softmax_focal_loss

State = tuple[Tensor, Tensor]

__all__ = [
    "ALRP",
    "RankSort",
    "alrp_loss",
    "ap_loss",
    "assign",
    "asymmetric_loss",
    "authentic_smooth_l1_loss",
    "bce_loss",
    "carl_loss",
    "ciou_loss",
    "class_balanced_weight",
    "diou_loss",
    "distribution_distillation_loss",
    "distribution_expectation",
    "distribution_focal_loss",
    "eiou_loss",
    "focal_star_loss",
    "gaussian_focal_loss",
    "generalized_focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "giou_loss",
    "iou",
    "iou_aware_bce_loss",
    "iou_hlr",
    "iou_loss",
    "isr_p_weight",
    "mal_loss",
    "matching_cost",
    "quality_focal_loss",
    "rank_sort_loss",
    "self_balanced_weight",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "varifocal_loss",
]

@overload
def ghm_c_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    bins: int = 10,
    momentum: float | Tensor = 0.0,
    state: None = None,
    bias_correction: bool = False,
    normalize: str = "nonempty",
    weight: Levels | None = None,
    ignore_index: int = -1,
    process_group: ProcessGroup | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> Tensor: ...
@overload
def ghm_c_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    bins: int = 10,
    momentum: float | Tensor = 0.0,
    state: State,
    bias_correction: bool = False,
    normalize: str = "nonempty",
    weight: Levels | None = None,
    ignore_index: int = -1,
    process_group: ProcessGroup | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> tuple[Tensor, State]: ...
@overload
def ghm_r_loss(
    pred: Levels,
    target: Levels,
    *,
    mu: float | Tensor = 0.02,
    bins: int = 10,
    momentum: float | Tensor = 0.0,
    state: None = None,
    bias_correction: bool = False,
    normalize: str = "nonempty",
    weight: Levels | None = None,
    process_group: ProcessGroup | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> Tensor: ...
@overload
def ghm_r_loss(
    pred: Levels,
    target: Levels,
    *,
    mu: float | Tensor = 0.02,
    bins: int = 10,
    momentum: float | Tensor = 0.0,
    state: State,
    bias_correction: bool = False,
    normalize: str = "nonempty",
    weight: Levels | None = None,
    process_group: ProcessGroup | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> tuple[Tensor, State]: ...
