"""Score images with version 2 of the LAION aesthetic predictor."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import CLIPModel

from .clip import CLIPScorer, load_processors
from .scorer import BatchedScorer, hub_file

HIDDEN = (1024, 128, 64, 16)  # widths of the hidden layers


class AestheticScorer(BatchedScorer):
    """Score how pleasing images look, without regard to their prompts. Usual scores are 4 to 7.

    `clip` computes the CLIP embedding of an image, and `head`, a stack of linear layers, computes the score from this
    embedding. `clip` and `head` run on the same device.
    """

    def __init__(self, clip: CLIPScorer, head: nn.ModuleDict, *, batch_size: int = 16):
        super().__init__("aesthetic", device=clip.device, batch_size=batch_size)
        self.clip = clip
        self.head = head.eval().requires_grad_(False).to(self.device)

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        embedding = self.clip.embed_images(images)  # (N, 768)
        return self.head["layers"](embedding)[:, 0]


def aesthetic(
    model: str = "openai/clip-vit-large-patch14",
    head: str = "trl-lib/ddpo-aesthetic-predictor",
    file: str = "aesthetic-model.pth",
    *,
    revision: str | None = None,
    head_revision: str | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 16,
) -> AestheticScorer:
    """Return the LAION aesthetic predictor as a scorer.

    Args:
        model (`str`): Hub id or folder of the CLIP model with its image processor.
        head (`str`): Hub id or folder of the linear layers. The default is a copy of the published file
            `sac+logos+ava1-l14-linearMSE.pth`.
        file (`str`): Name of the file with the weights of `head`. The file is read with `weights_only=True`.
        revision, head_revision (`str`, *optional*): Hub revisions of `model` and `head`.
        device, batch_size: See [`BatchedScorer`].

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor.
    """
    path = hub_file(head, file, head_revision)
    network = CLIPModel.from_pretrained(model, revision=revision)
    layers = linear_head(network.config.projection_dim)
    layers.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    settings: dict[str, Any] = load_processors(model, revision)
    return AestheticScorer(CLIPScorer("clip", network, **settings, device=device), layers, batch_size=batch_size)


def linear_head(width: int) -> nn.ModuleDict:
    """Return a stack of linear layers without activations, which computes one score from `width` features. ImageReward
    uses the same layers.

    In the published files, the linear layers are named `layers.{0,2,4,6,7}`, because dropout layers have numbers too.
    Here, identity layers replace the dropout layers, so that the names match.
    """
    sizes = (width, *HIDDEN, 1)
    layers = nn.Sequential()
    for index, (size, next_size) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(nn.Linear(size, next_size))
        if index < 3:
            layers.append(nn.Identity())
    return nn.ModuleDict({"layers": layers})
