"""HiDream-I1: experts are routed as diffusers does it, with gradients in every mode; images that are not square."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from tiny_pipelines import case

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.families.hidream import RoutedExperts
from trl_diffusion_sdpo.models.loading import load_model, load_reference


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_tokens_are_routed_as_by_diffusers(mode):
    theirs = MOEFeedForwardSwiGLU(dim=32, hidden_dim=48, num_routed_experts=4, num_activated_experts=2)
    ours = RoutedExperts(copy.deepcopy(theirs))
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
    layer = next(module for module in pipeline.transformer.modules() if isinstance(module, MOEFeedForwardSwiGLU))
    layer = RoutedExperts(layer)
    tokens = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(2))
    output = layer.train()(tokens)
    assert torch.equal(output, layer.eval()(tokens))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


def test_policy_and_reference_route_alike_and_keep_their_weights_and_names(family_folder):
    """A family by itself leaves the pipeline as it is, and no method of a module is replaced."""
    folder = family_folder("hidream")
    pipeline = case("hidream").build()
    find_family(pipeline)
    before = dict(pipeline.transformer.named_parameters())
    assert any(isinstance(module, MOEFeedForwardSwiGLU) for module in pipeline.transformer.modules())
    policy = load_model(pipeline)
    reference = load_reference(str(folder), policy)
    for denoiser in (policy.denoiser, reference):
        assert not any(isinstance(module, MOEFeedForwardSwiGLU) for module in denoiser.modules())
        assert not any({"forward", "patchify"} & vars(module).keys() for module in denoiser.modules())
        assert list(denoiser.state_dict()) == list(before)
    after = dict(pipeline.transformer.named_parameters())
    assert all(after[name] is weight for name, weight in before.items())


def test_an_image_that_is_not_square_must_fit_into_the_padded_sequence():
    family = find_family(case("hidream").build())
    family.check_image_size(16, 24)
    family.check_image_size(1024, 1024)
    with pytest.raises(ValueError, match="4096 tokens"):
        family.check_image_size(16, 8192)
