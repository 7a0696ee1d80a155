"""A step of ultralytics' YOLOv8 on our losses; `YOLO(...).train(...)` in the block trains, too."""

import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from tritonloss.integrations import ultralytics as host

model = DetectionModel("yolov8n.yaml", nc=3, verbose=False).train()
model.args = get_cfg()
batch = {"img": torch.rand(1, 3, 128, 128), "batch_idx": torch.zeros(2)}
batch |= {"cls": torch.tensor([[0.0], [2.0]]), "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]] * 2)}

with host.installed() as ours:
    losses, _ = model.loss(batch)
    losses.sum().backward()
print(", ".join(ours), [round(v, 3) for v in losses.tolist()])
