"""The trainer's interface to an engine: one process, DDP, FSDP2 or DeepSpeed ZeRO."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, save_fsdp_optimizer
from torch import nn
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from ..utils.errors import UserError
from . import sharding
from .gradient_backends import GradientBackend, gradient_backend, unwrapped
from .sharding import Float32Shards

logger = logging.getLogger(__name__)


class Engine:
    """Trains the model: a single process or DDP (both called `"plain"`), FSDP2, or DeepSpeed ZeRO.

    Args:
        accelerator (`Callable`): Returns the trainer's accelerator. Called at each use, because transformers creates
            the accelerator after the engine and changes its plugins until training begins.
        policy (`Callable`): Returns the policy as accelerate wrapped it for the engine.
    """

    def __init__(self, accelerator: Callable[[], Accelerator], policy: Callable[[], nn.Module]):
        self._accelerator = accelerator
        self._policy = policy
        self._second_models: list[nn.Module] = []  # frozen denoisers that are sharded like the policy

    @property
    def accelerator(self) -> Accelerator:
        """The trainer's `Accelerator`."""
        return self._accelerator()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast of training."""
        return self.accelerator.autocast()

    # ---- What runs ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the engine, such as `"plain"` (one process or DDP), `"fsdp"` or `"zero1, 8 processes"`. A checkpoint
        can be resumed only under an engine of the same name."""
        if self._is_deepspeed:
            return f"zero{self._zero_stage}, {self.accelerator.num_processes} processes"
        return "fsdp" if self._is_fsdp else "plain"

    @property
    def holds_shards(self) -> bool:
        """Whether the engine (FSDP2, DeepSpeed) shards the weights or the optimizer's float32 copies of them.

        The trainer can then train only once, and evaluate only after training has prepared the model.
        """
        return self._is_deepspeed or self._is_fsdp

    @property
    def shards_weights(self) -> bool:
        """Whether the engine (ZeRO-3, FSDP2) shards the weights themselves."""
        return self._is_fsdp or self._zero_stage == 3

    @property
    def steps_in_backward(self) -> bool:
        """Whether `accelerator.backward` also steps the optimizer, as under DeepSpeed."""
        return self._is_deepspeed

    @property
    def loads_weights_with_optimizer(self) -> bool:
        """Whether [`Engine.load_state`] reads weights and optimizer state together, after the model is prepared
        (DeepSpeed)."""
        return self._is_deepspeed

    @property
    def casts_weights(self) -> bool:
        """Whether `accelerator.prepare` changes the dtype of the weights, as under DeepSpeed."""
        return self._is_deepspeed

    @property
    def rounds_weights(self) -> bool:
        """Whether the engine rounds the weights themselves to half precision (DeepSpeed), not only copies."""
        return self._is_deepspeed and self.rounding is not None

    @property
    def rounding(self) -> torch.dtype | None:
        """Half-precision dtype to which the engine rounds all weights, or copies of them in each forward pass.

        `None` if it does not round (autocast may still).
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
        """Classes of DeepSpeed whose pickled objects are in its checkpoints. They are safe to load: unpickling
        them runs no code."""
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

    def check(self, asked: str | None = None) -> None:
        """Raise `ValueError` if the engine would split an image among processes, round gradients while exchanging them,
        or is not supported. Warn if another engine runs than `asked`, the name of one that shards."""
        if asked is not None and not self.holds_shards and self.accelerator.is_main_process:
            logger.warning(
                "The settings ask for %s, but accelerate does not run it here (%d processes, device %s). Training goes "
                "on without it: every process holds all weights and the whole optimizer state.",
                asked,
                self.accelerator.num_processes,
                self.accelerator.device.type,
            )
        parallel = self.accelerator.parallelism_config
        split = parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled)
        if self._is_deepspeed:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            split = split or config.get("tensor_parallel", {}).get("autotp_size", 0) > 1
            _refuse_zero_plus_plus(config.get("zero_optimization", {}))
        if split:
            raise UserError(
                "Each image must be processed by a single process, because its error is a mean over the image. Tensor, "
                "context and sequence parallelism split images. Use DDP, FSDP2 or ZeRO."
            )
        if self._is_fsdp and parallel is not None and parallel.dp_replicate_enabled:
            raise UserError(
                "FSDP must shard weights over all processes: copies of a shard would count several times in inner "
                "products of gradients. Got `parallelism_config` with "
                f"`dp_replicate_size={parallel.dp_replicate_size}` (HSDP). Leave `dp_replicate_size` out."
            )
        if self._is_fsdp and not self.accelerator.is_fsdp2:
            raise UserError(
                "FSDP must be version 2, got 1. Set `fsdp_version: 2` in accelerate's configuration, or "
                "`fsdp_config={'version': 2}`."
            )

    def complete_settings(self, *, exact_gradients: bool) -> None:
        """Set what this package's trainer needs in accelerate's plugins. Call it before the model is prepared.

        With `exact_gradients`, processes average gradients in float32, not in half precision. The parameter-space
        safeguard needs it: it subtracts gradients of similar size, beside whose difference rounding errors are large.
        """
        compiling = self.accelerator.state.dynamo_plugin
        if compiling.dynamic is False:
            # `accelerate launch` sets `dynamic=False` by default, with which torch would compile anew for every image
            # size, and give up after a few.
            compiling.dynamic = None
        if self.accelerator.is_fsdp2:
            plugin = self.accelerator.state.fsdp_plugin
            # All processes have the weights, so process 0 need not send them. Sending fails on buffers.
            plugin.cpu_ram_efficient_loading = False
            policy = plugin.mixed_precision_policy
            if policy is not None and policy.param_dtype is not None:
                # By default, FSDP rounds every input, including timesteps. Autocast is enough: it rounds only inputs of
                # matrix products and convolutions.
                settings = {"reduce_dtype": torch.float32} if exact_gradients else {}
                plugin.mixed_precision_policy = dataclasses.replace(policy, cast_forward_inputs=False, **settings)
            # Otherwise every process would hold full gradients until the last micro-batch.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        elif self._zero_stage >= 2 and exact_gradients:  # with these options, ZeRO-1 would use another optimizer class
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            config.setdefault("communication_data_type", "fp32")

    def unrounded(self, module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
        """Return the trained weights' exact values, by parameter, before the engine rounds them, for a later
        [`Engine.restore_unrounded`]. Empty if the engine does not round.
        """
        if not self.rounds_weights:
            return {}
        return {weight: weight.data for weight in module.parameters() if weight.requires_grad}

    def shard_before_preparing(self, module: nn.Module, unrounded: dict[nn.Parameter, torch.Tensor]) -> None:
        """Under ZeRO-3, move a module from the CPU to the device in shards, one weight at a time, where
        `accelerator.prepare` would first move it whole. The values in `unrounded` (from [`Engine.unrounded`]) are
        replaced by their shards. Other engines do nothing here.
        """
        if self._zero_stage == 3:
            sharding.zero3_partition(module, self.accelerator, self.rounding, unrounded)

    def preparing(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context for `accelerator.prepare`, in which FSDP2 frees the whole weights of a block once it has
        sharded them."""
        return sharding.freeing_whole_weights(model) if self.accelerator.is_fsdp2 else contextlib.nullcontext()

    def restore_unrounded(self, weights: dict[nn.Parameter, torch.Tensor]) -> None:
        """Copy exact weights (from [`Engine.unrounded`]) into the optimizer's float32 weights, after the model is
        prepared, and empty the dictionary.

        DeepSpeed initializes the optimizer's from the rounded weights, whose rounding error is larger than the change
        by many training steps.
        """
        sharding.restore_unrounded(weights)

    def gradient_backend(self) -> GradientBackend:
        """Return the back end that accumulates the gradients of winners and losers separately. Call it after the engine
        has wrapped the policy.

        Raises:
            `ValueError`: If the engine's settings allow no separate gradients.
        """
        return gradient_backend(self._policy(), self.accelerator)

    # ---- Weights --------------------------------------------------------------------------------------------------

    def average(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over all processes, which must call this together."""
        return cast(torch.Tensor, self.accelerator.reduce(value, "mean"))

    def reshard(self) -> None:
        """Turn the weights that FSDP2 leaves gathered, after a forward pass without gradients, into shards again.

        Call it before reading or writing weights.
        """
        if self._is_fsdp:
            for model in (self._policy(), *self._second_models):
                sharding.reshard(model)

    def gather(self, tensors: dict[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
        """Gather the full values of named weights on the CPU, one at a time. Call it in all processes.

        Args:
            tensors (`dict[str, torch.Tensor]`): Parameters and buffers of a module by name, not detached.
            keep (`bool`): Whether this process gets the weights. Otherwise, it only sends its shards, and gets an empty
                dictionary.

        Returns:
            `dict[str, torch.Tensor]`: Copies by name; of trained weights, the optimizer's float32 values.
        """
        gathered = {}
        for name, tensor in tensors.items():
            value = sharding.gather_float32(tensor, self._zero_stage)
            if keep:
                gathered[name] = value.detach().to("cpu", copy=True).contiguous()
        return gathered

    @torch.no_grad()
    def scatter(self, values: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        """Copy full tensors into the weights of the same names in `into`, perhaps sharded. Call it in all processes."""
        for name, tensor in into.items():
            sharding.scatter(values[name], tensor, self._zero_stage)

    @torch.no_grad()
    def mix(self, references: Iterable[torch.Tensor], policies: Iterable[torch.Tensor], alpha: float) -> None:
        """Update reference weights in place: `ref = alpha * policy + (1 - alpha) * ref`. Call it in all processes."""
        for reference, policy in zip(references, policies, strict=True):
            with sharding.gathered([reference, policy] if self._zero_stage == 3 else [], write=True):
                reference.lerp_(policy.to(reference.dtype), alpha)

    def float32_shards(self, weights: dict[str, torch.Tensor]) -> Float32Shards:
        """Return sharded float32 copies of weights that the engine will round. Call it before the model is prepared."""
        return Float32Shards(weights, self.accelerator, self._zero_stage)

    def shard_like_policy(self, module: nn.Module, *, moves: bool) -> nn.Module:
        """Move a frozen module from the CPU to the device, with the same sharding and precision as the policy.

        The module is changed in place. To save memory, each weight (under FSDP2, each block) is sharded before the
        next is moved.

        Args:
            moves (`bool`): Whether training updates the module's weights. FSDP2 then keeps them in float32: half
                precision would lose the small updates.

        Returns:
            `nn.Module`: Module to call instead of `module`.
        """
        dtype = self.rounding
        if self.accelerator.is_fsdp2:
            # FSDP would round weights to this dtype at every use anyway.
            self._second_models.append(sharding.fsdp2_shard(module, self.accelerator, None if moves else dtype))
            return self._second_models[-1]
        if not self._is_deepspeed:
            return module.to(self.accelerator.device)
        if self._zero_stage < 3:
            return module.to(dtype=dtype).to(self.accelerator.device)
        sharding.zero3_partition(module, self.accelerator, dtype, {})
        return sharding.zero3_engine(module, self.accelerator)

    @contextlib.contextmanager
    def computing(self, module: nn.Module, *, is_policy: bool) -> Iterator[nn.Module]:
        """Within the context, yield a complete (unsharded) module on the device, rounded as the engine will round the
        policy: in a copy, if it rounds weights.

        Under one process or DDP, the policy is not moved: it is already on its device.
        """
        dtype = self.rounding
        before = next(module.parameters()).device
        moves = before != self.accelerator.device and (self.holds_shards or not is_policy)
        working = module if dtype is None else self._rounded_copy(module, dtype)
        held = [(weight, weight.data) for weight in module.parameters()]
        if moves:
            working.to(self.accelerator.device)
        try:
            yield working
        finally:
            if working is module and moves:
                for weight, values in held:  # moving them back would give each process a copy of its own
                    weight.data = values
                module.to(before)  # the buffers

    def _rounded_copy(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return a copy of a module as the engine would round it, whose weights are cast and moved to the device one by
        one."""
        memo: dict[int, Any] = {}
        for weight in module.parameters():
            if type(weight) is nn.Parameter and weight.is_floating_point():
                values = weight.detach().to(self.accelerator.device, dtype)
                memo[id(weight)] = nn.Parameter(values, requires_grad=weight.requires_grad)
        copied = copy.deepcopy(module, memo)
        return copied.to(dtype) if self._is_deepspeed else copied  # DeepSpeed rounds buffers as well

    # ---- Checkpoints ----------------------------------------------------------------------------------------------

    def check_resumable(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `ValueError` if a checkpoint of this prepared optimizer could not be resumed."""
        plain = unwrapped(optimizer)
        stateless = isinstance(plain, torch.optim.SGD) and not any(group["momentum"] for group in plain.param_groups)
        if self._is_fsdp and stateless:  # torch reads the device of a sharded state from the state's tensors
            raise UserError(
                "Under FSDP, SGD without momentum cannot be resumed, because torch cannot load an optimizer state "
                "that has no tensors. Set `save_strategy='no'` or `save_only_model=True`, use momentum, or train with "
                "DDP or ZeRO."
            )

    def save_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
        """Write the sharded optimizer state under FSDP2 or DeepSpeed into `folder`. Call it in all processes.

        `model` and `optimizer` must be those that `accelerator.prepare` returned.
        """
        if self._is_deepspeed:
            cast(Any, model).save_checkpoint(folder, exclude_frozen_parameters=True)
        else:
            save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, optimizer, model, folder)

    def load_state(self, model: nn.Module, folder: str) -> None:
        """Load the weights and the optimizer state that [`Engine.save_state`] wrote under DeepSpeed."""
        # Not strictly: the checkpoint lacks the frozen weights.
        deepspeed_load_checkpoint(model, folder, load_module_strict=False)


def _refuse_zero_plus_plus(config: dict[str, Any]) -> None:
    """Raise `ValueError` if settings turn on DeepSpeed's ZeRO++, which rounds gradients and weights to send them."""
    defaults = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False}
    active = {name: config[name] for name, off in defaults.items() if config.get(name, off) != off}
    if active:
        raise UserError(
            "DeepSpeed's ZeRO++ must be off, because it rounds gradients, and rounds policy and reference "
            f"differently. Got {active}. Leave these settings out of DeepSpeed's configuration."
        )
