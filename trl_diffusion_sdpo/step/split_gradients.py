"""Separate gradients of winners and losers, from one forward and one backward pass of the whole batch.

Winners and losers are rows of one batch, and rows meet only in the gradients of weights, which are sums over rows. So
one backward pass computes the gradients of all activations, and each module with trained weights computes their
gradients twice: from the winners' rows, and from the losers'. That is as much arithmetic as in a plain backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn


class SplitGradients:
    """Splits the gradients of a denoiser's trained weights into those of a batch's first half of rows, the winners, and
    those of its second half, the losers.

    It does so where a module with trained weights takes a tensor with the batch in its first dimension.
    [`~SplitGradients.verify`] finds out whether all do.

    Args:
        model (`nn.Module`): Denoiser, whose trained weights are those with `requires_grad`.
        weights (`Sequence[nn.Parameter]`): These weights, in the order of the gradients.

    Attributes:
        leaves (`tuple` of two lists): Two tensors for each weight, which get the gradients: winners', then losers'.
        trouble (`str`, *optional*): Why the gradients of the last forward pass cannot be split, in a few words.
    """

    def __init__(self, model: nn.Module, weights: Sequence[nn.Parameter]):
        self._weights = weights
        number = {weight: i for i, weight in enumerate(weights)}
        owned = {
            module: [w for w in module.parameters(recurse=False) if w.requires_grad] for module in model.modules()
        }
        self._owned = {module: own for module, own in owned.items() if own}
        self._numbers = {module: [number[weight] for weight in own] for module, own in self._owned.items()}
        self.leaves: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self.trouble: str | None = None
        self._rows = 0  # in the batch on its way; 0 outside of `active`
        self._mixed: list[torch.Tensor] | None = None  # in `verify`: whether rows of losers got a gradient

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether all trained weights belong to modules without submodules, such as `nn.Linear`."""
        return not any(
            weight.requires_grad
            for module in model.modules()
            if next(module.children(), None) is not None
            for weight in module.parameters(recurse=False)
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Split the gradients of forward and backward passes within the context."""
        hooks: list[Any] = []
        for module in self._owned:
            hooks.append(module.register_forward_pre_hook(self._before))
            hooks.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            self._rows = 0
            for hook in hooks:
                hook.remove()

    def predict(self, predict: Callable[[], torch.Tensor], rows: int) -> torch.Tensor:
        """Return `predict()`, a prediction for a batch of `rows` rows, whose backward pass reaches `leaves` instead of
        the weights. Call it and the backward pass in [`~SplitGradients.active`], and check `trouble` between them."""
        self.leaves = ([_leaf(weight) for weight in self._weights], [_leaf(weight) for weight in self._weights])
        self.trouble = None
        self._rows = rows
        return predict()

    def verify(self, predict: Callable[[], torch.Tensor], rows: int) -> None:
        """Set `trouble` if the gradients cannot be split: if a gradient of winners reaches a row of losers within the
        model, or a weight is also used outside of its module. Costs a forward and a backward pass, and waits for the
        device."""
        self._mixed = []
        device = self._weights[0].device
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                prediction = self.predict(predict, rows)
                if self.trouble is None:
                    prediction[: rows // 2].sum().backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as an operation in place on the output of a module
            self.trouble = f"autograd refuses it ({str(error).splitlines()[0]})"
        if self.trouble is None and any(weight.grad is not None for weight in self._weights):
            self.trouble = "a trained weight is used outside of its module"
        if self.trouble is None and self._mixed and bool(torch.stack(self._mixed).any()):
            self.trouble = "the batch is not the first dimension in every module"
        self._mixed = None
        for weight in self._weights:
            weight.requires_grad_(True)  # also after an error within a module
            weight.grad = None

    def _before(self, module: nn.Module, args: Any) -> Any:
        """Keep autograd from computing the gradient of the module's weights. Other uses of them still get one, which
        `verify` sees."""
        if not self._is_on():
            return None
        for weight in self._owned[module]:
            weight.requires_grad_(False)
        device = self._owned[module][0].device.type
        if _is_matrix(module) and torch.is_autocast_enabled(device):
            # What autocast would do: here, so that the cast copy is kept once.
            dtype = torch.get_autocast_dtype(device)
            return tuple(value.to(dtype) if value.dtype == torch.float32 else value for value in args)
        return None

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._is_on():
            return None
        for weight in self._owned[module]:
            weight.requires_grad_(True)
        if output is None:  # activation checkpointing ends its second forward pass by an exception
            return None
        if kwargs or len(args) != 1 or not isinstance(output, torch.Tensor):
            self.trouble = f"{type(module).__name__} takes or returns more than one tensor"
        elif len(args[0]) != self._rows or len(args[0]) != len(output):  # such as tokens packed into one dimension
            self.trouble = f"{type(module).__name__} gets no batch in its first dimension"
        else:
            leaves = [half[i] for half in self.leaves for i in self._numbers[module]]
            return _Split.apply(output, args[0].detach(), self, module, *leaves)
        return None

    def _is_on(self) -> bool:
        return torch.is_grad_enabled() and self._rows > 0 and self.trouble is None

    def gradients(self, module: nn.Module, saved: torch.Tensor, at_output: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients of a module's weights, first all of the winners, then all of the losers."""
        if self._mixed is not None:
            self._mixed.append(at_output.chunk(2)[1].any())
            return [None] * (2 * len(self._owned[module]))
        rows = zip(saved.chunk(2), at_output.chunk(2), strict=True)
        return [part for half in rows for part in _weight_gradients(module, self._owned[module], *half)]


class _Split(torch.autograd.Function):
    """Returns a module's output unchanged, and computes the gradients of the module's weights."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, saved: torch.Tensor, split: SplitGradients, module: nn.Module, *leaves: Any
    ) -> torch.Tensor:
        device = saved.device.type
        ctx.save_for_backward(saved)
        ctx.split = split
        ctx.module = module
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, at_output: torch.Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        with torch.autocast(*ctx.autocast):
            return at_output, None, None, None, *ctx.split.gradients(ctx.module, saved, at_output)


def _leaf(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().requires_grad_()


def _is_matrix(module: nn.Module) -> bool:
    """Whether the weight's gradient is a product of `saved` and `at_output` that is written out below."""
    if type(module).forward is nn.Conv2d.forward:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module).forward is nn.Linear.forward


def _weight_gradients(
    module: nn.Module, weights: list[nn.Parameter], saved: torch.Tensor, at_output: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Return the gradients of a module's trained weights, from rows of its input and of the gradient at its output."""
    if not _is_matrix(module):  # a normalization: its forward pass costs little
        # On a CPU, torch 2.13 crashes in the gradients of a `nn.GroupNorm`'s weights alone from channels-last tensors.
        with torch.enable_grad():
            return torch.autograd.grad(module.forward(saved.contiguous()), weights, at_output.contiguous())
    gradients: dict[Any, torch.Tensor] = {}
    if isinstance(module, nn.Linear):
        columns = at_output.flatten(0, -2)
        gradients[module.weight] = columns.T @ saved.flatten(0, -2)
        if module.bias is not None:
            gradients[module.bias] = columns.sum(0)
    elif isinstance(module, nn.Conv2d):
        # `torch.nn.grad.conv2d_weight` passes an expanded number in place of the weight, which is then copied whole.
        unread = torch.empty_like(module.weight, dtype=at_output.dtype)
        how = (module.stride, module.padding, module.dilation, False, [0, 0], module.groups, (False, True, False))
        gradients[module.weight] = torch.ops.aten.convolution_backward(at_output, saved, unread, None, *how)[1]
        if module.bias is not None:
            gradients[module.bias] = at_output.sum((0, 2, 3))
    return [gradients[weight] for weight in weights]
