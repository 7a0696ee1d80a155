"""The loss functions: the same objects as in ``tritonloss`` itself."""

from .losses.boxes import ciou_loss, diou_loss, eiou_loss, giou_loss, iou, iou_loss
from .losses.distribution import (
    distribution_distillation_loss,
    distribution_expectation,
    distribution_focal_loss,
)
from .losses.ghm import ghm_c_loss, ghm_r_loss
from .losses.matching import assign, matching_cost
from .losses.pointwise import (
    asymmetric_loss,
    authentic_smooth_l1_loss,
    class_balanced_weight,
    focal_star_loss,
    gaussian_focal_loss,
    generalized_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)
from .losses.prime_sample import carl_loss, iou_hlr, isr_p_weight
from .losses.quality import bce_loss, iou_aware_bce_loss, mal_loss
from .losses.ranking import (
    ALRP,
    RankSort,
    alrp_loss,
    ap_loss,
    rank_sort_loss,
    self_balanced_weight,
)
from .losses.softmax_focal import softmax_focal_loss

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
