"""Check of diffusers' attention back end."""

from __future__ import annotations

from torch import nn

from ..utils._compat import attention_backends
from ..utils.errors import UserError

NO_BACKWARD = "sage"  # back ends with this word in their name have no backward pass


def check_attention(denoiser: nn.Module) -> None:
    """Raise `ValueError` if a denoiser's attention uses a back end without a backward pass. Back ends are chosen by
    diffusers: by its variable `DIFFUSERS_ATTN_BACKEND`, or by the method `set_attention_backend` of the denoiser."""
    refused = [name for name in attention_backends(denoiser) if NO_BACKWARD in name]
    if refused:
        raise UserError(
            "Training needs an attention back end with a backward pass. Back ends that quantize queries and keys have "
            f"none, got {refused[0]!r}. Choose another one in `DIFFUSERS_ATTN_BACKEND` or `set_attention_backend`."
        )
