"""HiDream-I1: experts are routed as diffusers does it, with gradients in every mode; images that are not square."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from tiny_pipelines import case

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.families.hidream import mend


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_tokens_are_routed_as_by_diffusers(mode):
    theirs = MOEFeedForwardSwiGLU(dim=32, hidden_dim=48, num_routed_experts=4, num_activated_experts=2)
    ours = copy.deepcopy(theirs)
    mend(ours)
    tokens = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    given, expected = (tokens.clone().requires_grad_() for _ in range(2))
    output = getattr(ours, mode)()(given)
    torch.testing.assert_close(output, getattr(theirs, mode)()(expected))
    wanted = theirs.train()(expected)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(given.grad, expected.grad)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_a_layer_gives_the_same_bits_in_both_modes_also_with_an_expert_without_tokens():
    pipeline = case("hidream").build()
    find_family(pipeline)
    layer = next(module for module in pipeline.transformer.modules() if isinstance(module, MOEFeedForwardSwiGLU))
    tokens = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(2))
    output = layer.train()(tokens)
    assert torch.equal(output, layer.eval()(tokens))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


def test_an_image_that_is_not_square_must_fit_into_the_padded_sequence():
    family = find_family(case("hidream").build())
    family.check_image_size(16, 24)
    family.check_image_size(1024, 1024)
    with pytest.raises(ValueError, match="4096 tokens"):
        family.check_image_size(16, 8192)
