"""Functions that make a model faster: they compile blocks with torch.compile or set diffusers' attention back end."""

from __future__ import annotations

from diffusers import ModelMixin

from ..utils._compat import attention_backends, has_attention_backends, repeated_blocks
from ..utils.hints import did_you_mean

NO_BACKWARD = "sage"  # back ends with this word in their name have no backward pass


def compile_blocks(denoiser: ModelMixin, backend: str | None, mode: str | None) -> None:
    """Compile the repeated blocks of a denoiser in place. Each kind of block is compiled once.

    Raises:
        `ValueError`: If the denoiser's class in diffusers does not list its repeated blocks.
    """
    if not repeated_blocks(denoiser):
        raise ValueError(
            "`torch_compile_regional` needs a model for which diffusers lists the repeated blocks. Got a "
            f"{type(denoiser).__name__} without such a list. Leave `torch_compile_regional` off; `torch_compile` then "
            "compiles the whole model."
        )
    denoiser.compile_repeated_blocks(backend=backend, mode=mode)


def set_attention(denoiser: ModelMixin, backend: str) -> None:
    """Set the attention back end of a denoiser, by the back end's name in diffusers. Other diffusers models in the same
    process may use this back end too after the call.

    Raises:
        `ValueError`: If diffusers has no such back end, if the back end's package is missing, if the back end has no
            backward pass, or if the denoiser does not call diffusers' back ends.
    """
    name = backend.lower()
    if name not in attention_backends():
        raise ValueError(
            f"`attention_backend` must be one of {', '.join(attention_backends())}; got {backend!r}."
            f"{did_you_mean(name, attention_backends())}"
        )
    if NO_BACKWARD in name:
        raise ValueError(
            "Training needs an attention back end with a backward pass. Back ends that quantize queries and keys have "
            f"no backward pass, got {backend!r}. Choose another `attention_backend`."
        )
    if not has_attention_backends(denoiser):
        raise ValueError(
            f"`attention_backend` has no effect on {type(denoiser).__name__}, because this model calls PyTorch's "
            "attention directly. PyTorch chooses a kernel itself (FlashAttention on most GPUs). Leave "
            "`attention_backend` unset."
        )
    try:
        denoiser.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`attention_backend={backend!r}` cannot be used here: {reason}") from error
