"""One interface for all ways to train: one process, DDP, FSDP2 and DeepSpeed ZeRO."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model, save_fsdp_optimizer
from torch import nn
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from . import sharding
from .gradient_backends import GradientBackend, gradient_backend, unwrapped
from .sharding import Float32Shards


class Engine:
    """Training engine of the process group: one process or DDP ("plain"), FSDP2, or DeepSpeed ZeRO.

    Args:
        accelerator (`Callable`): Returns the accelerator. It is called at each use, because transformers makes the
            accelerator after the model, and completes its plugins until training begins.
        policy (`Callable`): Returns the policy as the engine wrapped it.
    """

    def __init__(self, accelerator: Callable[[], Accelerator], policy: Callable[[], nn.Module]):
        self._accelerator = accelerator
        self._policy = policy
        self._second_models: list[nn.Module] = []  # frozen modules that are sharded like the policy

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of the trainer."""
        return self._accelerator()

    # ---- What runs ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the engine that must resume a checkpoint: `"plain"`, `"fsdp"`, `"zero1, 8 processes"`, ..."""
        if self._is_deepspeed:
            return f"zero{self._zero_stage}, {self.accelerator.num_processes} processes"
        return "fsdp" if self._is_fsdp else "plain"

    @property
    def holds_shards(self) -> bool:
        """Whether weights, or their float32 copies, are sharded.

        Such an engine trains a model only once. It evaluates the model only after training has prepared it.
        """
        return self._is_deepspeed or self._is_fsdp

    @property
    def shards_weights(self) -> bool:
        """Whether the weights themselves are sharded: ZeRO-3 and FSDP2."""
        return self._is_fsdp or self._zero_stage == 3

    @property
    def steps_in_backward(self) -> bool:
        """Whether accelerate's backward pass ends with the optimizer's step."""
        return self._is_deepspeed

    @property
    def loads_weights_with_optimizer(self) -> bool:
        """Whether [`Engine.load_state`] reads weights and optimizer state together, after the model is prepared."""
        return self._is_deepspeed

    @property
    def casts_weights(self) -> bool:
        """Whether preparing the model changes the dtype of its weights."""
        return self._is_deepspeed

    @property
    def rounds_weights(self) -> bool:
        """Whether the engine rounds the module's weights themselves to half precision, and not copies of them."""
        return self._is_deepspeed and self.rounding is not None

    @property
    def rounding(self) -> torch.dtype | None:
        """Half precision to which the engine rounds all weights, or copies of them at each use.

        `None` if autocast decides.
        """
        if self.accelerator.is_fsdp2:
            policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
            return None if policy is None else policy.param_dtype
        if not self._is_deepspeed:
            return None
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if config.get(name, {}).get("enabled") is True:
                return dtype
        return None

    @property
    def pickled_types(self) -> list[type]:
        """Classes of the engine that its checkpoints contain. Reading them runs no code."""
        if not self._is_deepspeed:
            return []
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

    @property
    def _is_deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def _is_fsdp(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def _zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return self.accelerator.state.deepspeed_plugin.zero_stage if self._is_deepspeed else 0

    # ---- Set-up ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `ValueError` if the engine would split an image over processes, or round gradients on the way."""
        parallel = self.accelerator.parallelism_config
        split = parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled)
        if self._is_deepspeed:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            split = split or config.get("tensor_parallel", {}).get("autotp_size", 0) > 1
            _refuse_zero_plus_plus(config.get("zero_optimization", {}))
        if split:
            raise ValueError(
                "Each image must be on one process, because errors are means over whole images. The settings have "
                "tensor, context or sequence parallelism, which splits images. Use DDP, FSDP2 or ZeRO."
            )
        if self._is_fsdp and parallel is not None and parallel.dp_replicate_enabled:
            raise ValueError(
                "FSDP must shard over all processes, because inner products of gradients would be summed over the "
                "copies of each shard. Got `parallelism_config` with `dp_replicate_size="
                f"{parallel.dp_replicate_size}` (HSDP). Leave `dp_replicate_size` out."
            )
        if self._is_fsdp and not self.accelerator.is_fsdp2:
            raise ValueError("FSDP must be version 2, got 1. Set `fsdp_version: 2` (`fsdp_config={'version': 2}`).")

    def complete_settings(self, *, exact_gradients: bool) -> None:
        """Complete the settings of accelerate's plugins, before the model is prepared.

        With `exact_gradients`, gradients are averaged in float32. The difference of two branches loses digits that
        their sum would not lose.
        """
        compiling = self.accelerator.state.dynamo_plugin
        if compiling.dynamic is False:
            # This is the default of `accelerate launch`. torch would compile every image size, until it gives up.
            compiling.dynamic = None
        if self.accelerator.is_fsdp2:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.cpu_ram_efficient_loading = False  # not needed, as all processes load weights; fails on buffers
            policy = plugin.mixed_precision_policy
            if policy is not None and policy.param_dtype is not None:
                # FSDP would round every input, including timesteps. Autocast rounds only inputs of matrix products
                # and convolutions.
                settings = {"reduce_dtype": torch.float32} if exact_gradients else {}
                plugin.mixed_precision_policy = dataclasses.replace(policy, cast_forward_inputs=False, **settings)
            # Otherwise every process holds full-size gradients until the last micro-batch.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        elif self._zero_stage >= 2 and exact_gradients:  # with these settings, ZeRO-1 uses another optimizer class
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            config.setdefault("communication_data_type", "fp32")

    def unrounded(self, module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
        """Return the trained weights before the model is prepared, for [`Engine.restore_unrounded`].

        The dictionary is empty if the engine does not round weights.
        """
        if not self.rounds_weights:
            return {}
        return {weight: weight.data for weight in module.parameters() if weight.requires_grad}

    def shard_before_preparing(self, module: nn.Module, unrounded: dict[nn.Parameter, torch.Tensor]) -> None:
        """Shard a module from the CPU under ZeRO-3, one weight at a time. Other engines do nothing here.

        `accelerator.prepare` would first move the whole module to the device. The values of [`Engine.unrounded`] become
        shards.
        """
        if self._zero_stage == 3:
            sharding.zero3_partition(module, self.accelerator, self.rounding, unrounded)

    def restore_unrounded(self, weights: dict[nn.Parameter, torch.Tensor]) -> None:
        """Copy these weights into the optimizer's float32 weights after the model is prepared. Empties the dictionary.

        DeepSpeed initializes the optimizer's weights from rounded ones. The rounding error exceeds many steps of
        training.
        """
        sharding.restore_unrounded(weights)

    def gradient_backend(self) -> GradientBackend:
        """Return the back end that accumulates the gradients of two branches separately. The engine must have wrapped
        the policy.

        Raises:
            `ValueError`: If the engine's settings do not allow separate gradients.
        """
        return gradient_backend(self._policy(), self.accelerator)

    # ---- Weights --------------------------------------------------------------------------------------------------

    def reshard(self) -> None:
        """Free the weights that FSDP2 leaves gathered after a forward pass without gradients.

        Call this before weights are read or written, so that parameters are shards again.
        """
        if self._is_fsdp:
            for model in (self._policy(), *self._second_models):
                sharding.reshard(model)

    def gather(self, tensors: dict[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
        """Gather named weights on the CPU, one at a time. All processes must call this.

        Args:
            tensors (`dict[str, torch.Tensor]`): Parameters and buffers of a module, not detached.
            keep (`bool`): Whether this process gets the weights. Other processes only send their shards and get an
                empty dictionary.

        Returns:
            `dict[str, torch.Tensor]`: Copies. Trained weights are the optimizer's float32 weights.
        """
        gathered = {}
        for name, tensor in tensors.items():
            value = sharding.gather_float32(tensor, self._zero_stage)
            if keep:
                gathered[name] = value.detach().to("cpu", copy=True).contiguous()
        return gathered

    @torch.no_grad()
    def scatter(self, values: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        """Copy full tensors into named weights, sharded or not. All processes must call this."""
        for name, tensor in into.items():
            sharding.scatter(values[name], tensor, self._zero_stage)

    @torch.no_grad()
    def mix(self, references: Iterable[torch.Tensor], policies: Iterable[torch.Tensor], alpha: float) -> None:
        """Set `ref = alpha * policy + (1 - alpha) * ref` in place, weight by weight. All processes must call this."""
        for reference, policy in zip(references, policies, strict=True):
            with sharding.gathered([reference, policy] if self._zero_stage == 3 else [], write=True):
                reference.lerp_(policy.to(reference.dtype), alpha)

    def float32_shards(self, weights: dict[str, torch.Tensor]) -> Float32Shards:
        """Return sharded float32 copies of weights that the engine will round. Call this before preparing the model."""
        return Float32Shards(weights, self.accelerator, self._zero_stage)

    def shard_like_policy(self, module: nn.Module, *, moves: bool) -> nn.Module:
        """Move a frozen module from the CPU to the device, in place, with the sharding and precision of the policy.

        Each weight is cast before it is moved, and weights are sharded one after the other.

        Args:
            moves (`bool`): Whether the module's weights are updated during training. FSDP2 then shards them without
                casting, because the updates are too small for half precision.

        Returns:
            `nn.Module`: The module to call instead.
        """
        dtype = self.rounding
        if self.accelerator.is_fsdp2:
            for weight in module.parameters() if dtype is not None and not moves else ():
                weight.data = weight.data.to(dtype)  # FSDP rounds them to it at every use
            self._second_models.append(fsdp2_prepare_model(self.accelerator, module).eval())
            return self._second_models[-1]
        if not self._is_deepspeed:
            return module.to(self.accelerator.device)
        if self._zero_stage < 3:
            return module.to(dtype=dtype).to(self.accelerator.device)
        sharding.zero3_partition(module, self.accelerator, dtype, {})
        return sharding.zero3_engine(module, self.accelerator)

    @contextlib.contextmanager
    def computing(self, module: nn.Module, *, is_policy: bool) -> Iterator[nn.Module]:
        """Yield an unsharded module on the device, rounded like the policy under this engine.

        If the engine rounds, the module is a copy. A policy without a sharding engine is already on its device, so it
        is not moved.
        """
        dtype, before = self.rounding, next(module.parameters()).device
        moves = before != self.accelerator.device and (self.holds_shards or not is_policy)
        working = module if dtype is None else copy.deepcopy(module)
        for weight in working.parameters() if dtype is not None else ():
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
        if self._is_deepspeed and dtype is not None:
            working.to(dtype)  # buffers as well
        if moves:
            working.to(self.accelerator.device)
        try:
            yield working
        finally:
            if working is module and moves:
                module.to(before)

    # ---- Checkpoints ----------------------------------------------------------------------------------------------

    def check_resumable(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `ValueError` if the state of a prepared optimizer could not be read from a checkpoint."""
        plain = unwrapped(optimizer)
        stateless = isinstance(plain, torch.optim.SGD) and not any(group["momentum"] for group in plain.param_groups)
        if self._is_fsdp and stateless:  # torch takes the device of a sharded state from one of its tensors
            raise ValueError(
                "Under FSDP, SGD without momentum cannot be resumed, because torch reads no optimizer state without "
                "tensors. Set `save_strategy='no'` or `save_only_model=True`, use momentum, or train with DDP or ZeRO."
            )

    def save_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
        """Write the sharded optimizer state of an engine that holds shards. All processes must call this.

        Model and optimizer must be those that `accelerator.prepare` returned.
        """
        if self._is_deepspeed:
            cast(Any, model).save_checkpoint(folder, exclude_frozen_parameters=True)
        else:
            save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, optimizer, model, folder)

    def load_state(self, model: nn.Module, folder: str) -> None:
        """Read the weights and optimizer state that DeepSpeed wrote in [`Engine.save_state`]."""
        # Not strict: the checkpoint lacks the frozen weights.
        deepspeed_load_checkpoint(model, folder, load_module_strict=False)


def _refuse_zero_plus_plus(config: dict[str, Any]) -> None:
    """Raise `ValueError` for settings of ZeRO++. It rounds gradients and keeps second shards of the weights."""
    defaults = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False}
    active = {name: config[name] for name, off in defaults.items() if config.get(name, off) != off}
    if active:
        raise ValueError(
            "DeepSpeed's ZeRO++ must be off, because it rounds gradients, and rounds policy and reference differently. "
            f"Got {active}. Leave these settings out."
        )
