"""Second copies of weights that an engine rounds: only the process that writes a checkpoint gets the exact weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trl_diffusion_sdpo.engines.sharding import Float32Shards
from trl_diffusion_sdpo.models.weight_copies import SecondDenoiser, WeightCopy


class RoundingEngine:
    """Stands in for DeepSpeed with bf16 in one process: weights are rounded, and `Float32Shards` keeps them exactly."""

    rounds_weights = True

    def float32_shards(self, weights):
        return Float32Shards(weights, SimpleNamespace(num_processes=1, device=torch.device("cpu")), zero_stage=2)

    def reshard(self):
        pass

    def gather(self, tensors, *, keep):
        return {name: tensor.detach().clone() for name, tensor in tensors.items()} if keep else {}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_only_the_process_that_saves_gets_the_exact_weights(one_process):
    """The others take part in gathering, and would each hold the whole copy in float32."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    exact = copy.deepcopy(policy).state_dict()
    second = WeightCopy(
        SecondDenoiser(copy.deepcopy(policy), policy, RoundingEngine()), "ema.safetensors", stored=True
    )
    second.keep_unrounded()
    second.second.module.to(torch.bfloat16)
    gathered = second.gather(keep=True)
    assert gathered.keys() == exact.keys()
    for name, weight in exact.items():
        assert torch.equal(gathered[name].to(weight.dtype), weight), name
    assert second.gather(keep=False) == {}
