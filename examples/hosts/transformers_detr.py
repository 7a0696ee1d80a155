"""A step of RT-DETR in transformers, with our matching cost and losses: five lines and a batch."""

import torch
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from tritonloss.integrations import transformers as host

backbone = RTDetrResNetConfig(
    embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)  # fmt: skip
config = RTDetrConfig(
    backbone_config=backbone, num_labels=3, num_queries=20, num_denoising=10, d_model=32,
    encoder_hidden_dim=32, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_layers=2,
    encoder_in_channels=[8, 16, 16], decoder_in_channels=[32, 32, 32],
    encoder_attention_heads=2, decoder_attention_heads=2,
)  # fmt: skip
model = RTDetrForObjectDetection(config).train()
images = torch.rand(2, 3, 128, 128)
labels = [{"class_labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) / 2} for _ in images]

with host.installed() as ours:
    print("\n".join(ours))
    loss = model(images, labels=labels).loss
    loss.backward()
print(f"loss {loss.item():.3f}")
