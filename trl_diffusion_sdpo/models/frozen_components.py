"""The components of a pipeline that do not train, VAE and text encoders: on the device, in the precision in which they
run, always or only while they are used."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..families import Family
from .loading import is_absent
from .numerics import torch_dtype
from .text_checks import check_text_encoding

logger = logging.getLogger(__name__)

VAE = "vae"
OVERFLOWS = "force_upcast"  # in a VAE's configuration: it overflows in float16


class FrozenComponents:
    """A family around a copy of its pipeline, as training uses it, and where its VAE and text encoders are.

    The given pipeline is not changed, except that components which keep their precision are shared with it.

    Args:
        family ([`~trl_diffusion_sdpo.families.Family`]): Its VAE and text encoders may be on the meta device.
        device (`torch.device`): Where they run.
        half_dtype (`torch.dtype`, *optional*): The dtype of autocast; `None` without autocast.
        vae_dtype (`str`): A dtype, or `"auto"` for that of autocast unless the VAE overflows there.
        vae_encode_batch_size (`int`, *optional*): Images per call of the VAE.
        guidance_scale (`float`, *optional*): Input of a denoiser that takes one.
        offload (`bool`): Whether they are on the CPU, in pinned memory, except while they are used.
        load (`Callable`, *optional*): Gives the pipeline with the components that are on the meta device.

    Attributes:
        family ([`~trl_diffusion_sdpo.families.Family`]): Its components are real within `in_use` only, unless the
            state is `"on device"`.
        state (`str`): `"on device"`, `"offloaded"` to the CPU, or `"absent"`: on the meta device.

    Raises:
        `ValueError`: If different prompts are encoded alike, or quantized components are to be offloaded.
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
        self._device, self._half_dtype, self._vae_dtype, self._load = device, half_dtype, vae_dtype, load
        absent = any(is_absent(getattr(family.pipeline, name)) for name in family.frozen_components)
        self.state = "absent" if absent else "offloaded" if offload else "on device"
        place = device if self.state == "on device" else torch.device("cpu")
        self._are_held = True
        self._given: list[tuple[nn.Module, torch.device]] = []  # with their own device, where that is no CPU
        for name in family.frozen_components if self.state == "offloaded" else ():
            part = getattr(family.pipeline, name)
            _check_movable(name, part)
            if part.device.type != "cpu":
                self._given.append((part, part.device))
        self._hold()
        self.family = type(family)(self._working(family, place))
        self.family.guidance_scale = guidance_scale
        self.family.vae_encode_batch_size = vae_encode_batch_size
        self.family.settle_dtype()
        self._kept = self._pinned() if self.state == "offloaded" else []
        self._users, self._was_checked, self._has_loaded = 0, False, False
        self._meta: dict[str, nn.Module] = {}  # in place of absent components
        if self.state != "absent":
            with self.in_use():
                pass  # checks the text encoders

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Family]:
        """The family with real VAE and text encoders on the device, in the precision in which they run. May be nested.

        Absent components are loaded from disk and freed afterwards. Offloaded ones are copied to the device, without
        waiting, and afterwards the copies are dropped; the device's cache is not emptied, which would wait.
        """
        self._users += 1
        try:
            if self._users == 1:
                self._bring()
            if not self._was_checked:
                self._was_checked = True
                check_text_encoding(self.family)
            yield self.family
        finally:
            self._users -= 1
            if self._users == 0:
                self._take_back()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, offloaded components of the given pipeline are on the device while they are used only; afterwards
        they are where they were given. Until the first of these contexts ends, they are as within."""
        self._are_held = True
        self._assign_kept()
        self._hold()
        try:
            yield
        finally:
            self._are_held = False
            self._release()

    def _hold(self) -> None:
        for part, _ in self._given:
            part.to("cpu")

    def _release(self) -> None:
        for part, device in self._given:
            part.to(device)

    def _bring(self) -> None:
        if self.state == "absent":
            self._read()
        copies: dict[int, torch.Tensor] = {}  # a tensor may be in several modules
        for module, name, tensor in self._kept:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(self._device, non_blocking=True)
            _assign(module, name, copies[id(tensor)])

    def _assign_kept(self) -> None:
        for module, name, tensor in self._kept:
            _assign(module, name, tensor)

    def _take_back(self) -> None:
        self._assign_kept()
        if not self._are_held:
            self._release()
        if self.state == "absent":
            self.family.pipeline.register_modules(**self._meta)
            gc.collect()
            if self._device.type != "cpu":
                clear_device_cache()

    def _read(self) -> None:
        """Load the absent components; the random states stay as they are."""
        if self._load is None:
            raise ValueError(
                "The pipeline's VAE or text encoders are on the meta device, without weights. Pass the Hub id or "
                "folder that they are in, or load the whole pipeline."
            )
        start, pipeline = time.monotonic(), self.family.pipeline
        self._meta = {name: getattr(pipeline, name) for name in self.family.frozen_components}
        with torch.random.fork_rng(devices=[]):
            loaded = type(self.family)(self._load())
        for name in self.family.frozen_components:
            getattr(loaded.pipeline, name).requires_grad_(False).eval()
        working = self._working(loaded, self._device)
        pipeline.register_modules(**{name: getattr(working, name) for name in self._meta})
        if not self._has_loaded:
            self._has_loaded = True
            logger.warning(
                "Loaded VAE and text encoders in %.1f s, as they are each time they are needed, and freed afterwards.",
                time.monotonic() - start,
            )

    def _working(self, family: Family, place: torch.device) -> DiffusionPipeline:
        return working_pipeline(family, device=place, half_dtype=self._half_dtype, vae_dtype=self._vae_dtype)

    def _pinned(self) -> list[tuple[nn.Module, str, torch.Tensor]]:
        """Every tensor of the components with its place, in pinned memory where copies to the device need that."""
        parts = [getattr(self.family.pipeline, name) for name in self.family.frozen_components]
        pinned: dict[int, torch.Tensor] = {}
        places = [
            (module, name, tensor) for part in parts for module in part.modules() for name, tensor in _own(module)
        ]
        for _, _, tensor in places:
            if id(tensor) not in pinned:
                pinned[id(tensor)] = tensor if self._device.type == "cpu" else tensor.pin_memory()
        return [(module, name, pinned[id(tensor)]) for module, name, tensor in places]


def working_pipeline(
    family: Family, *, device: torch.device, half_dtype: torch.dtype | None, vae_dtype: str
) -> DiffusionPipeline:
    """The pipeline of [`FrozenComponents`]. The denoiser and components that keep their precision are shared with the
    given pipeline; others are copied, so that what is saved, or generated after training, is not rounded. Components on
    the meta device stay there."""
    working = copy.copy(family.pipeline)
    for name in family.frozen_components:
        part = getattr(family.pipeline, name)
        if name == VAE:
            part = _working_vae(part, half_dtype, vae_dtype)
        elif half_dtype is not None and part.dtype.itemsize > half_dtype.itemsize and not _is_quantized(part):
            part = part if _text_overflows(part, half_dtype) else copy.deepcopy(part).to(half_dtype)
        there = {tensor.device for tensor in (*part.parameters(), *part.buffers())} <= {device}
        # What is there is not moved: networks in 8 bits refuse to be.
        working.register_modules(**{name: part if there or is_absent(part) else part.to(device)})
    return working


def _is_quantized(part: ModelMixin | PreTrainedModel) -> bool:
    """Whether a network's weights are numbers of another meaning; both libraries note it in its configuration."""
    stated = getattr(part.config, "quantization_config", None) is not None
    return stated or not all(weight.is_floating_point() for weight in part.parameters())


def _check_movable(name: str, part: ModelMixin | PreTrainedModel) -> None:
    if _is_quantized(part):
        raise ValueError(
            "`offload_frozen_components` and `precompute_latents` move the tensors of VAE and text encoders one by "
            f"one, and quantized weights belong together with their scales; those of `{name}` are quantized. Leave it "
            "out, or use `precompute_latents` with a Hub id or folder, whose components are freed instead."
        )


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's tensors without those of its submodules."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor into the place of a module's parameter or buffer."""
    if isinstance(getattr(module, name), nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, name, tensor)


def _working_vae(vae: ModelMixin, half: torch.dtype | None, wanted: str) -> ModelMixin:
    """The VAE in the wanted precision. Only float16 overflows, at 65504; bfloat16 has float32's range."""
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
    vae = copy.deepcopy(vae).to(dtype)
    if forced:
        logger.warning(
            "`vae_dtype='float16'` though the VAE's configuration says that it overflows there (`%s`): latents that "
            "are not finite will stop the run.",
            OVERFLOWS,
        )
        vae.register_to_config(**{OVERFLOWS: False})  # otherwise diffusers would encode in float32
    return vae


def _text_overflows(text_encoder: nn.Module, half: torch.dtype) -> bool:
    """Whether a text encoder may overflow: CLIP's do not in float16, T5 and language models do."""
    return half == torch.float16 and not type(text_encoder).__name__.startswith("CLIP")
