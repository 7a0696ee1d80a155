"""A small detector of the DETR family: the best cells of an image become queries of a decoder."""

from __future__ import annotations

import math

import torch
from torch import nn

from .model import Pyramid

STRIDE = 8


def positions(xy, channels: int):
    """Places (..., 2) in [0, 1] as sines and cosines (..., channels)."""
    rates = math.pi * 2 ** torch.linspace(0, 5, channels // 4, device=xy.device)
    waves = xy.unsqueeze(-1) * rates
    return torch.cat([waves.sin(), waves.cos()], -1).flatten(-2)


def mlp(n_in: int, n: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n), nn.ReLU(inplace=True), nn.Linear(n, n_out))


class Heads(nn.Module):
    """Class logits, and boxes as changes of those that are known, all in logit space."""

    def __init__(self, channels: int, n_classes: int, prior: float = 0.01):
        super().__init__()
        self.classify = nn.Linear(channels, n_classes)
        self.regress = mlp(channels, channels, 4)
        nn.init.constant_(self.classify.bias, -math.log(1 / prior - 1))
        nn.init.zeros_(self.regress[-1].weight)
        nn.init.zeros_(self.regress[-1].bias)

    def forward(self, x, known):
        return self.classify(x), known + self.regress(x)


class Layer(nn.Module):
    """Attention among the queries, attention of the queries to the image, two linear layers."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.among = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.image = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.linear = mlp(channels, 4 * channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, place, memory, memory_place):
        asked = x + place
        x = self.norms[0](x + self.among(asked, asked, x, need_weights=False)[0])
        seen = self.image(x + place, memory + memory_place, memory, need_weights=False)[0]
        x = self.norms[1](x + seen)
        return self.norms[2](x + self.linear(x))


class SmallDETR(nn.Module):
    """Image (B, 3, H, W) -> class logits (L, B, Q, C) and boxes (L, B, Q, 4), cx, cy, w, h.

    The first of the L layers is what the chosen cells themselves say, as in RT-DETR; each layer of
    the decoder changes the boxes of the one before. H and W are multiples of 16.
    """

    def __init__(self, n_classes: int, channels: int = 64, queries: int = 30, layers: int = 2):
        super().__init__()
        self.queries = queries
        self.pyramid = Pyramid(channels)
        self.cells = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.layers = nn.ModuleList(Layer(channels) for _ in range(layers))
        self.heads = nn.ModuleList(Heads(channels, n_classes) for _ in range(layers + 1))
        self.size = mlp(channels + 2, channels, channels)  # of a box, beside its place

    def forward(self, images):
        features = self.pyramid(images)[1]
        height, width = features.shape[-2:]
        y = (torch.arange(height, device=images.device) + 0.5) / height
        x = (torch.arange(width, device=images.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        memory = self.cells(features.flatten(2).transpose(1, 2))
        memory_place = positions(grid, memory.shape[-1])
        # a first guess: 4 cells high and wide, around the centre of the cell
        side = torch.tensor([4 / width, 4 / height], device=images.device).expand_as(grid)
        logits, boxes = self.heads[0](memory, torch.cat([grid, side], -1).logit())
        best = logits.amax(-1).topk(self.queries, 1).indices.unsqueeze(-1)

        def chosen(x):
            return x.gather(1, best.expand(-1, -1, x.shape[-1]))

        found = [(chosen(logits), chosen(boxes))]
        x = chosen(memory).detach()  # what the cells learn comes from their own logits
        for layer, heads in zip(self.layers, self.heads[1:], strict=True):
            known = found[-1][1].detach()
            box = known.sigmoid()
            place = positions(box[..., :2], x.shape[-1])
            place = self.size(torch.cat([place, box[..., 2:]], -1)) + place
            x = layer(x, place, memory, memory_place)
            found.append(heads(x, known))
        logits, boxes = (torch.stack(each) for each in zip(*found, strict=True))
        return logits, boxes.sigmoid()


@torch.no_grad()
def detect(model: SmallDETR, images, min_score: float = 0.005, most: int = 100):
    """Boxes, scores and labels in each image of a batch (B, 3, H, W): one query finds one object,
    so nothing is suppressed."""
    logits, boxes = (each[-1] for each in model(images))
    height, width = images.shape[-2:]
    centre, size = boxes.split(2, -1)
    scale = torch.tensor([width, height, width, height], device=images.device)
    corners = torch.cat([centre - size / 2, centre + size / 2], -1) * scale
    found = []
    for scores, places in zip(logits.sigmoid(), corners, strict=True):
        best, index = scores.flatten().topk(min(most, scores.numel()))
        best, index = best[best > min_score].cpu(), index[best > min_score].cpu()
        query, label = index // scores.shape[1], index % scores.shape[1]
        found.append((places.cpu()[query], best, label))
    return found
