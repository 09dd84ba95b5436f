"""Score images with VQAScore: ask a vision-language model whether an image shows the prompt. The score is the
probability of the answer "Yes"."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from .scorer import BatchedScorer

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'


class VQAScorer(BatchedScorer):
    """Score images by the probability that the first token of the model's answer is "Yes", in `[0, 1]`.

    Images are scored one at a time, so that no prompt is padded and scores do not depend on a batch. Scores of
    different models cannot be compared, so the scorer's name contains the model's name.

    Source: https://huggingface.co/papers/2404.01291.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        *,
        question: str = QUESTION,
        answer: str = "Yes",
        device: str | torch.device = "cpu",
    ):
        super().__init__(name, device=device, batch_size=1)
        if "{prompt}" not in question:
            raise ValueError(f"`question` must contain `{{prompt}}`, got {question!r}.")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor = processor
        self.question = question
        self.answer_token = processor.tokenizer.encode(answer, add_special_tokens=False)[0]

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        question = {"type": "text", "text": self.question.replace("{prompt}", prompts[0])}
        chat = [{"role": "user", "content": [{"type": "image"}, question]}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=[images[0]], return_tensors="pt").to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        logits = self.model(**inputs).logits[:, -1].float()  # (1, vocabulary)
        return logits.softmax(dim=-1)[:, self.answer_token]


def vqa_score(
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> VQAScorer:
    """Return the scorer VQAScore with a vision-language model of transformers.

    Args:
        model (`str`): Hub id or folder of the model and its processor.
        revision (`str`, *optional*): Hub revision of the model and its processor.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Dtype of the weights.
        settings: Further arguments of [`VQAScorer`]: `device`, `question` and `answer`. The prompt replaces `{prompt}`
            in `question`. The score is the probability of the first token of `answer`.
    """
    network = AutoModelForImageTextToText.from_pretrained(model, revision=revision, dtype=dtype)
    processor = AutoProcessor.from_pretrained(model, revision=revision)
    return VQAScorer(f"vqa_score({model.rstrip('/').split('/')[-1]})", network, processor, **settings)
