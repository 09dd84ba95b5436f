"""Makes pipelines without weights: networks are created on the meta device from their configurations, and fake tensors,
which have a shape, a dtype and a device but no data, replace the weights."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import BatchEncoding

from ...families import Family, find_family
from ...families.registry import family_for_class_name
from ...models.pipelines import CLASS, networks_without_weights, read_index
from ...utils._compat import FakeTensorMode
from ...utils.errors import UserError

PROMPT_TOKENS = 77  # default tokens of a prompt, as for CLIP


def pipeline_of_folder(name_or_path: str, dtype: torch.dtype, **access: Any) -> Family:
    """Return the family of a pipeline without weights. Only JSON files in the folder or on the Hub are read.

    Args:
        dtype (`torch.dtype`): Dtype of the networks.
        access: Arguments of `from_pretrained` for the Hub, such as `revision`, `token` and `cache_dir`.

    Raises:
        `ValueError`: If there is no pipeline, a component has no configuration, or no family supports the pipeline.
    """
    index = read_index(name_or_path, **access)
    family = family_for_class_name(index[CLASS])
    names = (family.denoiser_name, *family.frozen_components)
    parts: dict[str, Any] = networks_without_weights(family, index, name_or_path, names, dtype=dtype, **access)
    for name, entry in index.items():
        if name == "scheduler":
            scheduler_class = getattr(diffusers, str(entry[1]))
            config = scheduler_class.load_config(name_or_path, subfolder="scheduler", **access)
            parts[name] = scheduler_class.from_config(config)
        elif name.startswith(("tokenizer", "processor")):
            parts[name] = TokensOnly(_tokens(name_or_path, name))
    return _family(family.pipeline_classes[0], parts)


def fake_weights(modules: Iterable[nn.Module], mode: FakeTensorMode, dtype: torch.dtype | None = None) -> None:
    """Replace the modules' meta tensors by fake tensors on the CPU. Shared ones remain shared.

    Args:
        dtype (`torch.dtype`, *optional*): Dtype of all parameters. By default, each keeps its own.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for submodule in (submodule for module in modules for submodule in module.modules()):
        for name, tensor in (*submodule.named_parameters(recurse=False), *submodule.named_buffers(recurse=False)):
            if not tensor.is_meta:
                continue
            is_weight = isinstance(tensor, nn.Parameter)
            if id(tensor) not in made:
                with mode:
                    fake = torch.empty(
                        tensor.shape, dtype=dtype if dtype and is_weight else tensor.dtype, device="cpu"
                    )
                if is_weight:
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                made[id(tensor)] = tensor, fake
            setattr(submodule, name, made[id(tensor)][1])


class TokensOnly:
    """Stands in for a tokenizer: gives every prompt the largest number of tokens, all equal.

    Args:
        model_max_length (`int`): Tokens of a prompt if the pipeline does not pass `max_length`.
    """

    padding_side = "right"
    pad_token_id = eos_token_id = bos_token_id = 0
    eos_token = pad_token = bos_token = ""
    added_tokens_encoder: dict[str, int] = {}

    def __init__(self, model_max_length: int):
        self.model_max_length = model_max_length

    def __call__(self, text: Any, padding: Any = False, max_length: int | None = None, **settings: Any) -> Any:
        rows = 1 if isinstance(text, str) else len(text)
        # The pipeline's only unpadded, untruncated call is its check for truncated prompts.
        bounded = padding == "max_length" or settings.get("truncation")
        length = (max_length or self.model_max_length) if bounded else 2
        ids = torch.ones(rows, length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def tokenize(self, text: str) -> list[str]:
        return []

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **settings: Any) -> Any:
        rows = messages if messages and isinstance(messages[0], list) else [messages]
        if tokenize:
            return self(["" for _ in rows], **settings)
        return "" if len(rows) == 1 else ["" for _ in rows]


def _tokens(name_or_path: str, name: str) -> int:
    """Return the most tokens that a prompt can have, from a tokenizer's configuration in a local folder."""
    file = Path(name_or_path) / name / "tokenizer_config.json"
    if not file.is_file():
        return PROMPT_TOKENS
    length = json.loads(file.read_text(encoding="utf-8")).get("model_max_length", PROMPT_TOKENS)
    return int(min(length, 512))


def _family(class_name: str, parts: dict[str, Any]) -> Family:
    pipeline_class: type[DiffusionPipeline] = getattr(diffusers, class_name)
    taken = inspect.signature(pipeline_class).parameters
    components: dict[str, Any] = {}
    for name, parameter in taken.items():
        if parts.get(name) is not None or parameter.default is inspect.Parameter.empty:
            components[name] = parts.get(name)
    if "requires_safety_checker" in taken:
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        return find_family(pipeline_class(**components))
    except (KeyError, TypeError) as error:  # the pipeline uses something that the stand-in lacks
        raise needs_values(class_name) from error


def needs_values(name: str) -> UserError:
    """Return the error for a model whose memory cannot be planned."""
    return UserError(
        f"A plan simulates a step on tensors without values, and the tensor shapes of {name} depend on values. Train "
        "with `--max_steps 2` instead, and read the peak of memory from your GPU."
    )
