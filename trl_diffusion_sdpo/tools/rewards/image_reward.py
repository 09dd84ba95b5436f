"""Score images with ImageReward 1.0: BLIP with a head trained on images that people ranked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
)

from ...utils.score_scale import ScoreScale
from .aesthetic import linear_head
from .open_clip_keys import rename
from .scorer import BatchedScorer, hub_file

# Mean and standard deviation of the head's output on the authors' data, which normalise scores.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
MAX_TOKENS = 35

# Pattern in a weight's name in BLIP's original image encoder -> its replacement for `BlipVisionModel`.
_VISION_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"^norm\.": "post_layernorm.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}


class ImageRewardScorer(BatchedScorer):
    """Score how well images fit their prompts by ImageReward 1.0. On the authors' data, scores have mean 0 and standard
    deviation 1.

    `text` encodes the prompt, with cross-attention to the image features of `vision`, and `head` computes the score
    from the encoding's first token.

    Args:
        model (`str`): Hub id or folder with `ImageReward.pt` and `med_config.json`, read with `weights_only=True`.
        tokenizer (`str`): Hub id or folder of BERT's tokenizer.
        revision (`str`, *optional*): Revision of the model on the Hub.
        settings: `device` and `batch_size`. See [`BatchedScorer`].

    Source: https://huggingface.co/papers/2304.05977.
    """

    def __init__(
        self,
        model: str = "zai-org/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        *,
        revision: str | None = None,
        **settings: Any,
    ):
        super().__init__("image_reward", **settings)
        self.score_scale = ScoreScale(log_odds=STD)  # differences of the head's output are log-odds
        weights = hub_file(model, "ImageReward.pt", revision)
        med_config = json.loads(hub_file(model, "med_config.json", revision).read_text(encoding="utf-8"))
        vision = BlipVisionModel(published_vision())
        text = BlipTextModel(text_config(med_config), add_pooling_layer=False)
        head = linear_head(text.config.hidden_size)
        load_weights(torch.load(weights, map_location="cpu", weights_only=True), vision, text, head)
        self.vision = vision.eval().requires_grad_(False).to(self.device)
        self.text = text.eval().requires_grad_(False).to(self.device)
        self.head = head.eval().requires_grad_(False).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.image_processor = CLIPImageProcessorPil()

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        image = self.vision(pixels.to(self.device)).last_hidden_state  # (N, patches + 1, D)
        text = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=self.device),
            # It is `True` in the configuration, because only decoders have cross-attention. `False` lets every token
            # attend to the whole prompt.
            is_decoder=False,
        ).last_hidden_state
        raw = self.head["layers"](text[:, 0])[:, 0]
        return (raw - MEAN) / STD


def published_vision() -> BlipVisionConfig:
    """Return the configuration of the image encoder: ViT-L/16 for images of 224 pixels."""
    return BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )


def text_config(med_config: Mapping[str, Any]) -> BlipTextConfig:
    """Return the configuration of the text encoder, from the published `med_config.json`."""
    return BlipTextConfig(
        **{name: value for name, value in med_config.items() if name not in ("architectures", "model_type")},
        encoder_hidden_size=med_config["encoder_width"],
        is_decoder=True,
    )


def load_weights(
    weights: Mapping[str, torch.Tensor], vision: BlipVisionModel, text: BlipTextModel, head: nn.ModuleDict
) -> None:
    """Load the published weights into the two encoders and the head.

    Raises:
        `RuntimeError`: If weights are missing, have unknown names, or have wrong shapes.
    """
    towers: dict[str, dict[str, torch.Tensor]] = {"blip.visual_encoder": {}, "blip.text_encoder": {}, "mlp": {}}
    for name, weight in weights.items():
        tower = next((prefix for prefix in towers if name.startswith(f"{prefix}.")), None)
        if tower is not None and not name.endswith("position_ids"):  # position ids are a buffer, not a weight
            towers[tower][name.removeprefix(f"{tower}.")] = weight
    images = towers["blip.visual_encoder"]
    vision.load_state_dict({rename(name, _VISION_NAMES): weight for name, weight in images.items()})
    text.load_state_dict(towers["blip.text_encoder"])
    head.load_state_dict(towers["mlp"])
