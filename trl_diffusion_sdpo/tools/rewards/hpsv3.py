"""Score images with HPSv3: Qwen2-VL-7B with a head that predicts mean and spread of human votes. Needs a GPU with
24 GB."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLModel

from ...utils.errors import UserError
from .scorer import BatchedScorer, hub_file

REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
PIXELS = 256 * 28 * 28  # images are resized to about this many


class HPSv3Scorer(BatchedScorer):
    """Score images by the mean of human votes that HPSv3 predicts, without the predicted spread.

    The head computes it from the hidden state of the token `<|Reward|>`. Images are scored one at a time, so that no
    prompt is padded and scores do not depend on a batch.

    Args:
        instruction (`str`): The authors' instruction to the model, which follows the image, with `{text_prompt}` for
            the prompt. Concatenate `INSTRUCTION` and `prompt_with_special_token` from
            `hpsv3/dataset/data_collator_qwen.py` in the authors' repository. Any other text changes the scores.
        model (`str`): Hub id or folder of the weights, 16 GB.
        file (`str`): File name of the weights.
        base (`str`): Hub id or folder of the configuration, tokenizer and image processor.
        revision (`str`, *optional*): Revision of the weights on the Hub.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Dtype of the model. The head is float32.
        device: See [`BatchedScorer`].

    Source: https://huggingface.co/papers/2508.03789.
    """

    def __init__(
        self,
        instruction: str,
        model: str = "MizzenAI/HPSv3",
        file: str = "HPSv3.safetensors",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ):
        super().__init__("hpsv3", device=device, batch_size=1)
        for part in ("{text_prompt}", REWARD_TOKEN):
            if part not in instruction:
                raise UserError(f"`instruction` of HPSv3 must contain `{part}`, got {instruction[:200]!r}.")
        weights, head_weights = split_weights(load_file(hub_file(model, file, revision)))
        config = AutoConfig.from_pretrained(base)
        config.text_config.vocab_size = weights["language_model.embed_tokens.weight"].shape[0]
        network = Qwen2VLModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
        head = reward_head(config.text_config.hidden_size)
        head.load_state_dict(head_weights)
        size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        self.model = network.eval().requires_grad_(False).to(self.device)
        self.head = head.eval().requires_grad_(False).to(self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(base, size=size)
        self.instruction = instruction
        self.reward_token = self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels = self.image_processor(images, return_tensors="pt").to(self.device)
        question = {"type": "text", "text": self.instruction.replace("{text_prompt}", prompts[0])}
        chat = [{"role": "user", "content": [{"type": "image"}, question]}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # The model merges groups of image patches, and expects one image token for each.
        patches = int(pixels.image_grid_thw.prod()) // self.image_processor.merge_size**2
        tokens = self.tokenizer(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * patches), return_tensors="pt").to(self.device)
        image_tokens = tokens.input_ids == self.model.config.image_token_id
        hidden = self.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=pixels.pixel_values.to(self.model.dtype),
            image_grid_thw=pixels.image_grid_thw,
            mm_token_type_ids=image_tokens.int(),
            use_cache=False,
        ).last_hidden_state  # (1, tokens, D)
        outputs = self.head(hidden[tokens.input_ids == self.reward_token].float())  # (1, 2): mean and spread
        return outputs[:, 0]


def reward_head(width: int) -> nn.Sequential:
    """Return the layers from the hidden state of the token `<|Reward|>` to mean and spread.

    An identity layer stands in for the original's dropout layer, so that the layers have their published numbers.
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split the published weights into those of `Qwen2VLModel` and those of the head, the latter in float32.

    Weights may be named as in transformers before 4.52 (`visual.`, `model.layers.`) or later (`model.visual.`,
    `model.language_model.`).
    """
    network = {}
    head = {}
    for name, weight in weights.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = weight.float()
        elif not name.startswith("lm_head."):
            name = re.sub(r"^model\.(visual|language_model)\.", r"\1.", name)
            network[re.sub(r"^model\.", "language_model.", name)] = weight
    return network, head
