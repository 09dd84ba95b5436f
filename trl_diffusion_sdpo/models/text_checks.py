"""Checks that the text of prompts reaches the model, and counts prompts that are too long.

Without a tokenizer's vocabulary, all prompts become the same tokens, and training would run without an error but ignore
the prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..families import Family
from ..utils.errors import UserError

LONGEST = 1_000_000  # tokenizers without a limit report a larger number
PROMPTS = ("a red circle", "a big square")  # equal word lengths; without a vocabulary, both prompts give equal tokens


@torch.no_grad()
def check_text_encoding(family: Family) -> None:
    """Raise `ValueError` if a text encoder lacks embeddings of some tokens, or if two different prompts give equal
    tokens or equal encodings, or encodings that are not finite.

    The text encoders must already have the device and the dtype of training.
    """
    for name in family.frozen_components:
        tokenizer = _tokenizer_of(family, name)
        if tokenizer is None:
            continue
        text_encoder = getattr(family.pipeline, name)
        embeddings = text_encoder.get_input_embeddings() if isinstance(text_encoder, PreTrainedModel) else None
        if isinstance(embeddings, nn.Embedding) and len(tokenizer) > embeddings.num_embeddings:
            raise UserError(
                f"A text encoder must have an embedding for every token. The tokenizer of `{name}` has "
                f"{len(tokenizer)} tokens, and there are {embeddings.num_embeddings} embeddings. Load the tokenizer of "
                "this text encoder, or call its `resize_token_embeddings` if you added tokens."
            )
        first, second = (tokenizer(prompt)["input_ids"] for prompt in PROMPTS)
        if first == second:
            raise UserError(
                f"A tokenizer must turn different prompts into different tokens, but that of `{name}` turns both "
                f"{PROMPTS[0]!r} and {PROMPTS[1]!r} into {first}. Its vocabulary is missing. Download its folder again."
            )
    if family.takes_source:
        encoded = family.encode_edits(list(PROMPTS), [[Image.new("RGB", (256, 256))]] * len(PROMPTS))
    else:
        encoded = family.encode_prompts(list(PROMPTS))
    encoded = {name: value for name, value in encoded.items() if value.is_floating_point()}
    broken = [name for name, value in encoded.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"Encoded prompts must be finite, and `{broken[0]}` of {PROMPTS[0]!r} is not. The text encoder overflows "
            "in its dtype, or its weights are damaged. Load it in float32, or download it again."
        )
    if encoded and all(torch.equal(*value) for value in encoded.values()):
        raise UserError(
            f"Different prompts must have different encodings. {PROMPTS[0]!r} and {PROMPTS[1]!r} have the same "
            "encoding. The tokenizer's vocabulary or the text encoder's weights are missing. Download tokenizer and "
            "text encoder again."
        )


def _tokenizer_of(family: Family, text_encoder: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a text encoder, such as `tokenizer_2` for `text_encoder_2`, or `None` if it has none. A
    processor may contain it."""
    parts = family.pipeline.components
    other = parts.get("processor") if text_encoder == "text_encoder" else None
    tokenizer = parts.get(text_encoder.replace("text_encoder", "tokenizer"), other)
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def note_on_long_prompts(family: Family, prompts: Collection[str]) -> str:
    """Return a note for the data report on how many prompts are longer than a tokenizer's limit.

    Returns:
        `str`: One sentence, or nothing if all prompts are short enough.
    """
    notes = []
    for name, tokenizer in _limited(family).items():
        limit = tokenizer.model_max_length
        # A token has at least one byte, and tokenizers add two special tokens, so prompts with few bytes need no
        # tokenizer.
        candidates = (prompt for prompt in prompts if len(prompt.encode(errors="replace")) + 2 > limit)
        long = sum(len(tokenizer(prompt, verbose=False)["input_ids"]) > limit for prompt in candidates)
        if long:
            notes.append(f"{long} of {len(prompts)} prompts are longer than the {limit} tokens that `{name}` reads")
    return f"{'; '.join(notes)}: the rest of them is ignored." if notes else ""


def _limited(family: Family) -> dict[str, PreTrainedTokenizerBase]:
    """Return the tokenizers that limit the length of prompts, by the names of their text encoders."""
    tokenizers = {name: _tokenizer_of(family, name) for name in family.frozen_components}
    return {name: each for name, each in tokenizers.items() if each is not None and each.model_max_length <= LONGEST}


def hide_truncation_warnings(family: Family) -> None:
    """Silence the warnings of pipeline and tokenizer about long prompts, which the data report counts. (Pipelines
    tokenize a prompt a second time, without a limit, only to find what they have cut off.)"""
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_no_truncation_warning)
    for parent in type(family.pipeline).__mro__:
        if parent.__module__.startswith("diffusers."):
            logging.getLogger(parent.__module__).addFilter(_is_no_truncation_warning)  # adding twice has no effect


def _is_no_truncation_warning(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "input was truncated" not in message and "Token indices sequence length is longer" not in message
