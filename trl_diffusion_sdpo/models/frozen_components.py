"""VAE and text encoders of a pipeline, which are never trained.

They stay on the accelerator, or are there only while they encode.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..families import Family
from ..utils.errors import UserError
from .loading import is_absent
from .numerics import store_channels_last, torch_dtype
from .text_checks import check_text_encoding, hide_truncation_warnings

logger = logging.getLogger(__name__)

VAE = "vae"
UNPINNED = ("cpu", "mps")  # device types that share the CPU's memory and need no pinned memory
PINNED_BUFFER = 1 << 28  # bytes
ALIGNMENT = 64  # bytes, as PyTorch aligns tensors on the CPU
ModuleT = TypeVar("ModuleT", bound=nn.Module)
# Modes of `torch.compile` without CUDA graphs, in which the latents of the next images overwrite the last ones.
WITHOUT_CUDA_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
OVERFLOWS = "force_upcast"  # entry of a VAE's configuration; if true, the VAE overflows in float16


class FrozenComponents:
    """Holds a shallow copy of the user's pipeline, with VAE and text encoders in the dtypes that training needs.

    They are in one of three states. Within the context `in_use`, they always have weights and are on the device:

    | state | outside `in_use` | on entering `in_use` | on leaving |
    |---|---|---|---|
    | `"on device"` | on the device | - | - |
    | `"offloaded"` | on the CPU, in pinned memory | copied to the device asynchronously | the copies are deleted |
    | `"absent"` | on the meta device, without weights | loaded from disk | freed from memory |

    Components whose dtype changes are copied. The others are shared with the user's pipeline, and move there too.

    Args:
        family ([`~trl_diffusion_sdpo.families.Family`]): Family of the user's pipeline. VAE and text encoders may be on
            the meta device.
        half_dtype (`torch.dtype`, *optional*): Dtype of autocast; `None` without autocast.
        vae_dtype (`str`): Dtype of the VAE. `"auto"` is the dtype of autocast, unless the VAE overflows in this dtype.
        vae_encode_batch_size (`int`, *optional*): Number of images in one call of the VAE.
        guidance_scale (`float`, *optional*): Guidance scale that the denoiser receives, if it has such an input.
        offload (`bool`): Whether to use the state `"offloaded"` for components that have weights.
        load (`Callable`, *optional*): Loads a pipeline with the weights of VAE and text encoders, for the state
            `"absent"`.

    Raises:
        `ValueError`: If two different prompts give equal encodings, or if components are quantized and `offload` is
            set.
    """

    state: Literal["on device", "offloaded", "absent"]

    def __init__(
        self,
        family: Family,
        *,
        device: torch.device,
        half_dtype: torch.dtype | None,
        vae_dtype: str,
        vae_encode_batch_size: int | None = None,
        guidance_scale: float | None = None,
        offload: bool = False,
        load: Callable[[], DiffusionPipeline] | None = None,
    ):
        self._device = device
        self._half_dtype = half_dtype
        self._vae_dtype = vae_dtype
        self._load = load
        absent = any(is_absent(getattr(family.pipeline, name)) for name in family.frozen_components)
        self.state = "absent" if absent else "offloaded" if offload else "on device"
        if self.state == "offloaded":
            for name in family.frozen_components:
                _check_movable(name, getattr(family.pipeline, name))
        home = device if self.state == "on device" else torch.device("cpu")
        self.family = type(family)(self._working(family, home))
        self.family.guidance_scale = guidance_scale
        self.family.vae_encode_batch_size = vae_encode_batch_size
        self.family.settle_dtype()
        self._on_host = self._pinned_tensors() if self.state == "offloaded" else []
        self._is_within = False
        self._was_read = False
        hide_truncation_warnings(self.family)
        if self.state != "absent":  # absent components are checked when they are first loaded
            with self.in_use() as working:
                check_text_encoding(working)

    def in_use(self) -> contextlib.AbstractContextManager[Family]:
        """Return a context in which VAE and text encoders are on the device. It yields the family object that calls
        them, and may be nested."""
        if self.state == "on device" or self._is_within:
            return contextlib.nullcontext(self.family)
        return self._copied() if self.state == "offloaded" else self._read()

    def compile(self, backend: str | None, mode: str | None) -> None:
        """Compile the VAE's encoder and the text encoders in place, for their next calls. Names of weights stay."""
        for name in self.family.frozen_components:
            if name == self.family.unconditional_name:  # draws sample images only
                continue
            part = getattr(self.family.pipeline, name)
            encoder = part.encoder if name == VAE else part
            encoder.compile(backend=backend, mode=WITHOUT_CUDA_GRAPHS.get(mode or "", mode))

    @contextlib.contextmanager
    def _copied(self) -> Iterator[Family]:
        """Copy offloaded components to the device within the context."""
        copies: dict[int, torch.Tensor] = {}  # modules may share a tensor
        for module, name, tensor in self._on_host:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(self._device, non_blocking=True)
            _assign(module, name, copies[id(tensor)])
        del copies
        self._is_within = True
        try:
            yield self.family
        finally:
            self._is_within = False
            for module, name, tensor in self._on_host:
                _assign(module, name, tensor)

    @contextlib.contextmanager
    def _read(self) -> Iterator[Family]:
        """Load absent components from disk, and free them when the context ends. The CPU's random state does not
        change."""
        if self._load is None:
            raise UserError(
                "Training needs the weights of the pipeline's VAE and text encoders, but they are on the meta device, "
                "without any. Pass the Hub id or folder of the pipeline, or load the whole pipeline."
            )
        start = time.monotonic()
        pipeline = self.family.pipeline
        without_weights = {name: getattr(pipeline, name) for name in self.family.frozen_components}
        with torch.random.fork_rng(devices=[]):
            loaded = type(self.family)(self._load())
        for name in without_weights:
            getattr(loaded.pipeline, name).requires_grad_(False).eval()
        working = self._working(loaded, self._device)
        del loaded
        pipeline.register_modules(**{name: getattr(working, name) for name in without_weights})
        del working
        self._is_within = True
        try:
            if not self._was_read:
                self._was_read = True
                logger.info(
                    "Loaded VAE and text encoders in %.1f s. They are freed after each use, and loaded again for the "
                    "next.",
                    time.monotonic() - start,
                )
                check_text_encoding(self.family)
            yield self.family
        finally:
            self._is_within = False
            pipeline.register_modules(**without_weights)
            gc.collect()
            if self._device.type != "cpu":
                clear_device_cache()

    def _working(self, family: Family, device: torch.device) -> DiffusionPipeline:
        return working_pipeline(family, device=device, half_dtype=self._half_dtype, vae_dtype=self._vae_dtype)

    def _pinned_tensors(self) -> list[tuple[nn.Module, str, torch.Tensor]]:
        """Return a copy in pinned memory of every tensor of the components, with the tensor's module and name.

        If the device shares the CPU's memory, return the tensors themselves.
        """
        modules = [m for name in self.family.frozen_components for m in getattr(self.family.pipeline, name).modules()]
        owned = [(module, name, tensor) for module in modules for name, tensor in _own(module)]
        if self._device.type in UNPINNED:
            return owned
        distinct = {id(tensor): tensor for _, _, tensor in owned}  # modules may share a tensor
        copies = dict(zip(distinct, pin(list(distinct.values())), strict=True))
        return [(module, name, copies[id(tensor)]) for module, name, tensor in owned]


def pin(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of tensors in pinned CPU memory.

    PyTorch rounds each allocation of pinned memory up to a power of two, so a tensor alone can take twice its size. The
    copies lie one after the other in a few large buffers instead.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    capacity = 1 << (max([PINNED_BUFFER, *sizes]) - 1).bit_length()
    buffer = torch.empty(0, dtype=torch.uint8)
    copies = []
    for number, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if size > len(buffer):
            buffer = pinned_bytes(min(capacity, sum(sizes[number:])))
        strides = torch.empty_like(tensor, device="meta").stride()  # the same layout, without overlapping values
        values = buffer[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.size(), strides)
        copies.append(values.copy_(tensor.detach()))
        buffer = buffer[size:]
    return copies


def pinned_bytes(size: int) -> torch.Tensor:
    """Return an empty tensor of `size` bytes in pinned memory. Tests replace it."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def working_pipeline(
    family: Family, *, device: torch.device, half_dtype: torch.dtype | None, vae_dtype: str
) -> DiffusionPipeline:
    """Return a copy of the family's pipeline whose VAE and text encoders have the dtype and the device of training.

    It shares the denoiser, and components whose dtype does not change, with the family's pipeline; the others are
    copied, so that the user's pipeline is not rounded. What is on the meta device stays there. The VAE's convolutions
    get the channels-last layout, even if the VAE is shared.
    """
    working = copy.copy(family.pipeline)
    for name in family.frozen_components:
        part = getattr(family.pipeline, name)
        if name == VAE:
            part = _working_vae(part, half_dtype, vae_dtype)
            store_channels_last(part)
        elif half_dtype is not None and part.dtype.itemsize > half_dtype.itemsize and not _is_quantized(part):
            part = part if _text_overflows(part, half_dtype) else cast_copy(part, half_dtype)
        there = {tensor.device for tensor in (*part.parameters(), *part.buffers())} <= {device}
        # Not for components that are already on the device: `to` raises for 8-bit networks.
        working.register_modules(**{name: part if there or is_absent(part) else part.to(device)})
    return working


def cast_copy(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Return a copy of a module in another dtype.

    Weights are cast one by one, so the copy never takes more memory than its size in the new dtype.
    """
    memo: dict[int, Any] = {}
    for weight in module.parameters():
        if weight.is_floating_point():
            values = weight.detach().to(dtype, copy=True)
            memo[id(weight)] = nn.Parameter(values, requires_grad=weight.requires_grad)
    return copy.deepcopy(module, memo).to(dtype)


def _is_quantized(part: ModelMixin | PreTrainedModel) -> bool:
    """Return whether a network's configuration names a quantization, or some of its weights are not floating-point
    numbers."""
    stated = getattr(part.config, "quantization_config", None) is not None
    return stated or not all(weight.is_floating_point() for weight in part.parameters())


def _check_movable(name: str, part: ModelMixin | PreTrainedModel) -> None:
    if _is_quantized(part):
        raise UserError(
            f"`offload_frozen_components` and `precompute_latents` cannot move quantized components such as `{name}`: "
            "their weights must stay with their scales. Leave both settings out, or with `precompute_latents` pass the "
            "model as a Hub id or folder, whose components are freed instead."
        )


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the names and tensors of a module's own parameters and buffers, without those of its submodules."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if isinstance(getattr(module, name), nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, name, tensor)


def _working_vae(vae: ModelMixin, half: torch.dtype | None, wanted: str) -> ModelMixin:
    """Return the VAE in the dtype `wanted`, or in a suitable one for `"auto"`, as a copy if its dtype changes. It can
    overflow only in float16, because bfloat16 has the range of float32."""
    overflows = vae.config.get(OVERFLOWS, False)
    dtype = vae.dtype
    if wanted != "auto":
        dtype = torch_dtype(wanted)
    elif half is not None and dtype.itemsize > half.itemsize:
        dtype = half
    if wanted == "auto" and overflows and dtype == torch.float16:
        dtype = torch.bfloat16 if half == torch.bfloat16 else torch.float32
    forced = overflows and dtype == torch.float16
    if dtype == vae.dtype and not forced:
        return vae
    vae = cast_copy(vae, dtype)
    if forced:
        logger.warning(
            "`vae_dtype='float16'` overflows according to the VAE's configuration (`%s`), and the run stops if latents "
            "are not finite. Use 'auto' or 'bfloat16'.",
            OVERFLOWS,
        )
        vae.register_to_config(**{OVERFLOWS: False})  # if True, diffusers would encode in float32
    return vae


def _text_overflows(text_encoder: nn.Module, half: torch.dtype) -> bool:
    """Return whether a text encoder may overflow in the dtype `half`. In float16, T5 and language models may overflow,
    but CLIP does not."""
    return half == torch.float16 and not type(text_encoder).__name__.startswith("CLIP")
