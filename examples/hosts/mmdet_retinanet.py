"""A step of mmdetection's RetinaNet with Rank & Sort in place of the focal loss."""

from pathlib import Path

import mmdet
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

from tritonloss.integrations import mmdet as host

register_all_modules()
configs = Path(mmdet.__file__).parent / ".mim" / "configs"
config = Config.fromfile(configs / "retinanet" / "retinanet_r50_fpn_1x_coco.py")
config.model.backbone.init_cfg = None  # no download
size = {"img_shape": (128, 128), "batch_input_shape": (128, 128)}
sample = DetDataSample(metainfo=size | {"pad_shape": (128, 128), "scale_factor": (1.0, 1.0)})
boxes, labels = torch.tensor([[20.0, 30.0, 90.0, 100.0]]), torch.tensor([1])
sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)

host.install()
head = config.model.bbox_head
head.update(type="RankingRetinaHead", reg_decoded_bbox=True)
head.loss_cls, head.loss_bbox = {"type": "RankSortLoss"}, {"type": "GIoULoss"}
losses = MODELS.build(config.model).loss(torch.rand(1, 3, 128, 128), [sample])
print({name: round(float(value), 3) for name, value in losses.items()})
host.uninstall()
