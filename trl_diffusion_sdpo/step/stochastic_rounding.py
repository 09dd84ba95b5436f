"""Trains bf16 weights with torchao's AdamW, which rounds weights up or down at random (stochastic rounding).

bf16 has 8 significant bits, so rounding to the nearest value loses each update below 1/512 of its weight. At random,
the nearer value is the likelier one, and the weights are right on average.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import strtobool

# torchao's optimizers in transformers, and the bits of a value in their states.
LOW_BITS = {OptimizerNames.ADAMW_TORCH_8BIT: 8, OptimizerNames.ADAMW_TORCH_4BIT: 4}
SWITCH = "bf16_stochastic_round"  # key of `optim_args`
ADVICE = f"`optim='{OptimizerNames.ADAMW_TORCH_8BIT.value}'` and `optim_args='{SWITCH}=True'`"


def rounds_at_random(args: TrainingArguments) -> bool:
    """Return whether the settings choose an optimizer that rounds bf16 weights stochastically."""
    given = dict(word.partition("=")[::2] for word in (args.optim_args or "").replace(" ", "").split(","))
    return args.optim in LOW_BITS and bool(strtobool(given.get(SWITCH, "false")))


def may_step_in_backward(args: Any) -> bool:
    """Return whether the optimizer may step each weight within the backward pass, where its gradient must be complete
    and final. `args` is a complete `DiffusionSDPOConfig`."""
    return (
        rounds_at_random(args)
        and args.safeguard != "parameter"
        and args.gradient_accumulation_steps == 1
        and args.max_grad_norm == 0
    )


class WeightByWeight(torch.optim.Optimizer):
    """Mixin for an optimizer of torchao: steps one weight after the other, after or within the backward pass.

    The random numbers for rounding depend only on `seed`, the weight and the number of its updates. So all processes
    round equally, a resumed run rounds as an uninterrupted one, and stepping within the backward pass changes nothing.

    Args:
        seed (`int`): Seed of the rounding.
    """

    def __init__(self, params: Any, *, seed: int, **settings: Any):
        super().__init__(params, **settings)
        self._seed = seed
        self._norms: list[torch.Tensor] = []  # of the gradients that this step has freed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the weights that have a gradient."""
        for number, group, weight in self._weights():
            if weight.grad is not None:
                self._step_weight(number, group, weight)

    def step_in_backward(self) -> list[RemovableHandle]:
        """From now on, step each weight once its gradient is complete, and free the gradient. Remove the handles to
        stop."""
        self._norms = []
        return [
            weight.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, number, group))
            for number, group, weight in self._weights()
        ]

    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of the gradients that were freed since the last call, on the device."""
        norms = self._norms
        self._norms = []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"]).cpu()  # transformers reads it in each step
        # torch has cast all states to the weights' dtype.
        for number, _, weight in self._weights():
            for name, value in state_dict["state"].get(number, {}).items():
                if type(value) is torch.Tensor:
                    self.state[weight][name] = value.to("cpu" if name == "step" else weight.device, copy=True)

    def _weights(self) -> Iterator[tuple[int, dict[str, Any], nn.Parameter]]:
        """Yield each weight with its number in the state and its group."""
        number = 0
        for group in self.param_groups:
            for weight in group["params"]:
                yield number, group, weight
                number += 1

    def _on_gradient(self, number: int, group: dict[str, Any], weight: nn.Parameter) -> None:
        assert weight.grad is not None
        self._norms.append(torch.linalg.vector_norm(weight.grad, dtype=torch.float32))
        self._step_weight(number, group, weight)
        weight.grad = None

    def _step_weight(self, number: int, group: dict[str, Any], weight: nn.Parameter) -> None:
        updates = self.state[weight].get("updates", 0) if weight in self.state else 0
        groups = self.param_groups
        self.param_groups = [{**group, "params": [weight]}]
        try:
            with _seeded(weight.device, f"{self._seed} {number} {updates}"), _compiled_on(weight.device):
                super().step()
        finally:
            self.param_groups = groups
        state = self.state[weight]
        state["updates"] = updates + 1
        # torchao keeps the states of small weights in the weight's dtype. In bf16, an average of squares over 1,000
        # steps would stop moving: each step changes it by less than half of its last bit.
        for name, value in state.items():
            if type(value) is torch.Tensor and value.dtype is torch.bfloat16:
                state[name] = value.float()


@functools.cache
def weight_by_weight(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return an optimizer class of torchao with the mixin [`WeightByWeight`]."""
    return type(optimizer.__name__, (WeightByWeight, optimizer), {})


@contextlib.contextmanager
def _seeded(device: torch.device, facts: str) -> Iterator[None]:
    """Within the context, seed the device's global generator, which torchao uses."""
    seed = int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=4).digest(), "big")
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        if on_cpu:
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(device).manual_seed(seed)
        yield


def _compiled_on(device: torch.device) -> Any:
    """Return a context in which torchao compiles its step, except on a CPU, where compiling takes longer than it
    saves."""
    return torch.compiler.set_stance("force_eager" if device.type == "cpu" else "default")
