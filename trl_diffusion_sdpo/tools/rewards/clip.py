"""Score images by comparing the CLIP embeddings of image and prompt: PickScore, CLIP score, HPSv2 and HPSv2.1."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from ...utils.errors import UserError
from ...utils.score_scale import PICKSCORE_COSINES, ScoreScale
from .open_clip_keys import clip_state_dict
from .scorer import BatchedScorer, hub_file

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
Preprocess = Literal["crop", "pad"]
# Curly quotes and the straight quotes by which open_clip's tokenizer (ftfy) replaces them.
_QUOTES = str.maketrans(
    {**dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"), **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')}
)


class CLIPScorer(BatchedScorer):
    """Score an image by the cosine similarity of its and the prompt's CLIP embeddings, times a scale.

    Args:
        name (`str`): Name of the scorer in tables and files.
        model (`str` or `CLIPModel`): Hub id or folder of the CLIP model, or a loaded model.
        processor (`str`, *optional*): Hub id or folder of the tokenizer and the image processor. If unset, `model`.
        revision (`str`, *optional*): Revision of `model` on the Hub.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of the weights.
        scale (`float`, *optional*): Factor of the cosine similarity, by default the model's `exp(logit_scale)`.
        clamp (`bool`, *optional*, defaults to `False`): Whether negative scores are set to 0.
        prefix (`str`, *optional*, defaults to `""`): Text before each prompt.
        preprocess (`"crop"` or `"pad"`, *optional*, defaults to `"crop"`): `"crop"` scales an image's shorter side to
            the model's input size and crops the centre. `"pad"` scales the longer side and fills the rest of the square
            with black, like the package `hpsv2`. Square images score nearly the same either way.
        clean_text (`bool`, *optional*, defaults to `False`): Whether to replace HTML entities and curly quotes in
            prompts, as open_clip does.
        settings: `device` and `batch_size`. See [`BatchedScorer`].
    """

    def __init__(
        self,
        name: str,
        model: str | CLIPModel,
        processor: str | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float | None = 1.0,
        clamp: bool = False,
        prefix: str = "",
        preprocess: Preprocess = "crop",
        clean_text: bool = False,
        **settings: Any,
    ):
        super().__init__(name, **settings)
        if preprocess not in ("crop", "pad"):
            raise UserError(f"`preprocess` must be `crop` or `pad`, got {preprocess!r}.")
        network: Any = model
        if isinstance(model, str):
            network = CLIPModel.from_pretrained(model, revision=revision or "main", dtype=dtype)
        self.model = network.eval().requires_grad_(False).to(self.device, dtype)
        source: Any = model if processor is None else processor
        source_revision = "main" if revision is None or processor is not None else revision
        self.tokenizer = AutoTokenizer.from_pretrained(source, revision=source_revision)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(source, revision=source_revision)
        self.scale = scale
        self.clamp = clamp
        self.prefix = prefix
        self.preprocess = preprocess
        self.clean_text = clean_text
        factor = self.logit_factor if scale is None else scale
        self.score_scale = ScoreScale(lowest=0.0 if clamp else -factor, highest=factor)

    @property
    def logit_factor(self) -> float:
        """The model's `exp(logit_scale)`, which turns cosine similarities into logits."""
        return float(self.model.logit_scale.float().exp())

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        image = self.embed_images(images)
        text = self.embed_prompts(prompts)
        scale = self.model.logit_scale.exp() if self.scale is None else self.scale
        scores = scale * (image * text).sum(dim=-1)  # (N, D) * (N, D) -> (N,)
        return scores.clamp(min=0) if self.clamp else scores

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the CLIP embeddings of N images, normalised to length 1, `(N, D)`."""
        if self.preprocess == "pad":
            pixels = torch.stack([padded_pixels(image, self.image_processor) for image in images])
        else:
            pixels = self.image_processor(images, return_tensors="pt").pixel_values
        embedding = self.model.get_image_features(pixels.to(self.device, self.model.dtype)).pooler_output
        return torch.nn.functional.normalize(embedding.float(), dim=-1)

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Return the CLIP embeddings of N prompts, normalised to length 1, `(N, D)`."""
        if self.clean_text:
            prompts = [html.unescape(html.unescape(prompt)).translate(_QUOTES) for prompt in prompts]
        tokens = self.tokenizer(
            [self.prefix + prompt for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        embedding = self.model.get_text_features(tokens.input_ids.to(self.device)).pooler_output
        return torch.nn.functional.normalize(embedding.float(), dim=-1)


def padded_pixels(image: Image.Image, image_processor: CLIPImageProcessorPil) -> torch.Tensor:
    """Return an image as the model's input `(3, size, size)`: fitted into a square, padded with black, and
    normalised."""
    size = image_processor.crop_size["height"]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255
    ratio = size / max(image.size)
    height = round(image.height * ratio)
    width = round(image.width * ratio)
    if ratio != 1:
        pixels = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    left = (size - width) // 2
    top = (size - height) // 2
    pixels = torch.nn.functional.pad(pixels, (left, size - width - left, top, size - height - top))[0]
    mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std).view(3, 1, 1)
    return (pixels - mean) / std


def pickscore(model: str = "yuvalkirstain/PickScore_v1", processor: str = CLIP_H, **settings: Any) -> CLIPScorer:
    """Return the scorer PickScore: the cosine similarity times `exp(logit_scale)`. Usual scores are 19 to 23.

    Arguments are those of [`CLIPScorer`]. Use a second scorer too: like most preference-tuned models, PickScore was
    trained on the data set Pick-a-Pic, so it may favour them.

    Source: https://huggingface.co/papers/2305.01569.
    """
    scorer = CLIPScorer("pickscore", model, processor, scale=None, **settings)
    factor = scorer.logit_factor
    low = PICKSCORE_COSINES.low
    high = PICKSCORE_COSINES.high
    assert low is not None and high is not None
    scorer.score_scale = replace(scorer.score_scale, low=factor * low, high=factor * high, log_odds=1.0)
    return scorer


def clip_score(model: str = CLIP_H, **settings: Any) -> CLIPScorer:
    """Return a scorer by the cosine similarity of the image's and the prompt's CLIP embeddings. Arguments are those of
    [`CLIPScorer`].

    The Diffusion-SDPO authors use the default model, ViT-H/14.
    """
    return CLIPScorer("clip_score", model, **settings)


def clip_score_hessel(model: str = "openai/clip-vit-base-patch32", **settings: Any) -> CLIPScorer:
    """Return the scorer CLIPScore as Hessel et al. published it: `2.5 * max(cos, 0)`, with the text "A photo depicts"
    before each prompt. Arguments are those of [`CLIPScorer`].

    Source: https://huggingface.co/papers/2104.08718.
    """
    return CLIPScorer("clip_score_hessel", model, scale=2.5, clamp=True, prefix="A photo depicts ", **settings)


def hpsv2(
    model: str = "xswu/HPSv2",
    file: str = "HPS_v2_compressed.pt",
    processor: str = CLIP_H,
    *,
    name: str = "hpsv2",
    **settings: Any,
) -> CLIPScorer:
    """Return the scorer HPSv2: the cosine similarity of a CLIP ViT-H/14 tuned on human votes. Usual scores are
    0.25 to 0.33.

    Arguments are those of [`hpsv21`].

    Source: https://huggingface.co/papers/2306.09341.
    """
    return hpsv21(model, file, processor, name=name, **settings)


def hpsv21(
    model: str = "xswu/HPSv2",
    file: str = "HPS_v2.1_compressed.pt",
    processor: str = CLIP_H,
    *,
    name: str = "hpsv2.1",
    revision: str | None = None,
    clean_text: bool = True,
    **settings: Any,
) -> CLIPScorer:
    """Return the scorer HPSv2.1. Papers since 2025 call it "HPS" or "HPSv2", and often print its scores times 100.

    Args:
        model (`str`): Hub id or folder of the weights.
        file (`str`): Name of the file with the weights in open_clip's format, read with `weights_only=True`.
        processor (`str`): Hub id or folder of the tokenizer, the image processor and the network's configuration.
        name, revision, clean_text, settings: See [`CLIPScorer`]. The package `hpsv2` scores with autocast and
            `preprocess="pad"`. The Diffusion-SDPO authors use `preprocess="crop"`, the default.

    Source: https://github.com/tgxs002/HPSv2.
    """
    path = hub_file(model, file, revision)
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network = CLIPModel(CLIPConfig.from_pretrained(processor))
    network.load_state_dict(clip_state_dict(weights))
    scorer = CLIPScorer(name, network, processor, clean_text=clean_text, **settings)
    # HPSv2 was trained so that cosines times `exp(logit_scale)` are log-odds.
    log_odds = 1.0 if scorer.scale is None else scorer.logit_factor / scorer.scale
    scorer.score_scale = replace(scorer.score_scale, log_odds=log_odds)
    return scorer
