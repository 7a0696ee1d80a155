"""A step of torchvision's RetinaNet on our losses: the model and the data stay as they are."""

import torch
from torchvision.models.detection import retinanet_resnet50_fpn_v2

from tritonloss.integrations import torchvision as host

model = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, min_size=128, max_size=128)
images, boxes = [torch.rand(3, 128, 128)], torch.tensor([[20.0, 30.0, 90.0, 100.0]])
targets = [{"boxes": boxes, "labels": torch.tensor([1])}]

with host.installed() as ours:
    losses = model.train()(images, targets)
print(", ".join(ours), {name: round(value.item(), 3) for name, value in losses.items()})
