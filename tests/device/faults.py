"""Faults that only an accelerator would show. Tests plant them to see that the pretend device notices them."""

import contextlib

import torch

from trl_diffusion_sdpo.step import meters as finite


@contextlib.contextmanager
def _misplaced(trainer):
    """A tensor made on the CPU in the step."""
    draw = trainer.pair_forward.draw_noise

    def on_the_host(seeds, latents):
        timesteps, noise = draw(seeds, latents)
        return timesteps, noise + torch.randn(noise.shape)

    trainer.pair_forward.draw_noise = on_the_host
    yield


@contextlib.contextmanager
def _item(trainer):
    """A value of the loss read in the step."""
    loss_of = trainer.pair_forward.loss

    def read_loss_of(*args, **kwargs):
        outputs = loss_of(*args, **kwargs)
        outputs.loss.item()
        return outputs

    trainer.pair_forward.loss = read_loss_of
    yield


@contextlib.contextmanager
def _early(trainer):
    """A verdict read before it has arrived."""
    copy = finite.HostCopy.read
    finite.HostCopy.read = lambda self: self._values.tolist()
    try:
        yield
    finally:
        finite.HostCopy.read = copy


@contextlib.contextmanager
def _none(trainer):
    yield


FAULTS = {None: _none, "misplaced": _misplaced, "item": _item, "early": _early}
