"""Score images with VQAScore: the probability that a vision-language model, asked whether an image shows the prompt,
answers "Yes"."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...utils.errors import UserError
from ...utils.score_scale import ScoreScale
from .scorer import BatchedScorer

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'


class VQAScorer(BatchedScorer):
    """Score images by the probability that the first token of the model's answer is "Yes", in `[0, 1]`.

    Images are scored one at a time, so that no prompt is padded and scores do not depend on a batch. Scores of
    different models cannot be compared, so the scorer's name contains the model's.

    Args:
        model (`str`): Hub id or folder of a vision-language model of transformers and its processor.
        question (`str`, *optional*): Question about the image, with `{prompt}` for the prompt.
        answer (`str`, *optional*, defaults to `"Yes"`): Answer whose first token's probability is the score.
        revision (`str`, *optional*): Hub revision of the model and its processor.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Dtype of the weights.
        device: See [`BatchedScorer`].

    Source: https://huggingface.co/papers/2404.01291.
    """

    score_scale = ScoreScale(low=0.0, high=1.0, lowest=0.0, highest=1.0)

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        question: str = QUESTION,
        answer: str = "Yes",
        revision: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ):
        super().__init__(f"vqa_score({model.rstrip('/').split('/')[-1]})", device=device, batch_size=1)
        if "{prompt}" not in question:
            raise UserError(f"`question` must contain `{{prompt}}`, got {question!r}.")
        network = AutoModelForImageTextToText.from_pretrained(model, revision=revision, dtype=dtype)
        self.model = network.eval().requires_grad_(False).to(self.device)
        self.processor = AutoProcessor.from_pretrained(model, revision=revision)
        self.question = question
        self.answer_token = self.processor.tokenizer.encode(answer, add_special_tokens=False)[0]

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        question = {"type": "text", "text": self.question.replace("{prompt}", prompts[0])}
        chat = [{"role": "user", "content": [{"type": "image"}, question]}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=[images[0]], return_tensors="pt").to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        logits = self.model(**inputs).logits[:, -1].float()  # (1, vocabulary)
        return logits.softmax(dim=-1)[:, self.answer_token]
