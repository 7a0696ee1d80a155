"""What a user writes, for type checkers (and it runs): tests/test_package.py."""

from typing import assert_type

import torch
from torch import Tensor

import tritonloss
import tritonloss as tl

x = torch.randn(4, 3, requires_grad=True)
labels = torch.tensor([0, 3, 1, 3])
quality = torch.rand(4)
boxes = torch.rand(4, 4).sort().values

assert_type(tl.sigmoid_focal_loss(x, labels, alpha=None), Tensor)
assert_type(tl.quality_focal_loss(x, (labels, quality), avg_factor=labels.sum()), Tensor)
assert_type(tl.FocalLoss(alpha=0.25, gamma=2.0)(x, labels, avg_factor=2), Tensor)
assert_type(tl.GIoULoss(reduction="sum")(boxes, boxes), Tensor)
assert_type(tl.iou(boxes, boxes), Tensor)
assert_type(tl.rank_sort_loss(x, labels), tl.RankSort)
assert_type(tl.RankSortLoss(delta=0.5)(x, labels).rank, Tensor)
assert_type(tl.ALRPLoss()(x, labels, quality), tl.ALRP)
assert_type(tl.GHMCLoss(bins=30, momentum=0.75)(x, labels), Tensor)
assert_type(tl.ghm_c_loss(x, labels), Tensor)
state = torch.zeros(10), torch.zeros(10)
assert_type(tl.ghm_c_loss(x, labels, state=state)[1], tuple[Tensor, Tensor])
found = tl.SetCriterion("focal")(
    x.expand(1, 1, 4, 3), boxes.expand(1, 1, 4, 4), [labels[:1]], [boxes[:1]]
)
assert_type(found, dict[str, Tensor])
assert_type(tl.reduce_avg_factor(labels.sum(), None), Tensor)
diagnosis = tl.Diagnosis()
diagnosis.update(x, labels)
report = diagnosis.read()
assert_type(report, tl.Report)
assert_type(tl.show_config(), str)
assert_type(tritonloss.__version__, str)
with tl.backend("eager"):
    pass
