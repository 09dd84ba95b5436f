"""Score images with version 2 of the LAION aesthetic predictor."""

from __future__ import annotations

import torch
from PIL import Image
from torch import nn

from .clip import CLIPScorer
from .scorer import BatchedScorer, hub_file

HIDDEN = (1024, 128, 64, 16)  # widths of the hidden layers


class AestheticScorer(BatchedScorer):
    """Score how pleasing images look, whatever their prompts. Usual scores are 4 to 7.

    A stack of linear layers computes the score from an image's CLIP embedding.

    Args:
        model (`str`): Hub id or folder of the CLIP model with its image processor.
        head (`str`): Hub id or folder of the linear layers. The default is a copy of the published file
            `sac+logos+ava1-l14-linearMSE.pth`.
        file (`str`): Name of the file with the weights of `head`, read with `weights_only=True`.
        revision, head_revision (`str`, *optional*): Hub revisions of `model` and `head`.
        device, batch_size: See [`BatchedScorer`].

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        file: str = "aesthetic-model.pth",
        *,
        revision: str | None = None,
        head_revision: str | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 16,
    ):
        super().__init__("aesthetic", device=device, batch_size=batch_size)
        path = hub_file(head, file, head_revision)
        self.clip = CLIPScorer("clip", model, revision=revision, device=device)
        layers = linear_head(self.clip.model.config.projection_dim)
        layers.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.head = layers.eval().requires_grad_(False).to(self.device)

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        embedding = self.clip.embed_images(images)  # (N, 768)
        return self.head["layers"](embedding)[:, 0]


def linear_head(width: int) -> nn.ModuleDict:
    """Return a stack of linear layers without activations, which computes one score from `width` features. ImageReward
    uses the same.

    The published files name the layers `layers.{0,2,4,6,7}`, counting dropout layers. Identity layers stand in for
    those, so that the names match.
    """
    sizes = (width, *HIDDEN, 1)
    layers = nn.Sequential()
    for index, (size, next_size) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(nn.Linear(size, next_size))
        if index < 3:
            layers.append(nn.Identity())
    return nn.ModuleDict({"layers": layers})
