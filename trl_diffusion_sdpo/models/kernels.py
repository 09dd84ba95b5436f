"""Chooses a denoiser's kernels: compiled blocks and diffusers' attention back ends."""

from __future__ import annotations

from diffusers import ModelMixin

from ..utils._compat import attention_backends, has_attention_backends, repeated_blocks
from ..utils.hints import did_you_mean

WITHOUT_CUDA_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}  # modes of torch.compile
NO_BACKWARD = "sage"  # back ends with this word in their name have no backward pass


def compile_blocks(denoiser: ModelMixin, backend: str | None, mode: str | None) -> None:
    """Compile the repeated blocks of a denoiser in place. Each kind of block is compiled once.

    Raises:
        `ValueError`: If diffusers lists no repeated blocks for this denoiser.
    """
    if not repeated_blocks(denoiser):
        raise ValueError(
            f"`torch_compile_regional` compiles repeated blocks, and diffusers names none of {type(denoiser).__name__}."
            " Leave it off: `torch_compile` then compiles the whole model."
        )
    denoiser.compile_repeated_blocks(backend=backend, mode=mode)


def compile_encoder(vae: ModelMixin | None, backend: str | None, mode: str | None) -> None:
    """Compile the encoder of a VAE in place, if the pipeline has a VAE.

    The encoder is compiled without CUDA graphs. With them, each call of the encoder would overwrite the latents of the
    call before it.
    """
    if vae is not None:
        vae.encoder.compile(backend=backend, mode=None if mode is None else WITHOUT_CUDA_GRAPHS.get(mode, mode))


def set_attention(denoiser: ModelMixin, backend: str) -> None:
    """Set the attention back end of a denoiser by its name in diffusers. This also affects other models of the process.

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
            f"`attention_backend={backend!r}` quantizes queries and keys and has no backward pass. Use another one."
        )
    if not has_attention_backends(denoiser):
        raise ValueError(
            f"`attention_backend` cannot act: diffusers' {type(denoiser).__name__} calls PyTorch's own attention, "
            "which chooses a kernel by itself (FlashAttention on most GPUs). Leave it unset."
        )
    try:
        denoiser.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`attention_backend={backend!r}` cannot be used here: {reason}") from error
