"""Loading from a folder or the Hub: a quantized base never passes through full precision, of a named reference only
the denoiser is loaded, and encoders that are left out are not read."""

import enum
import functools
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.quantizers import auto as quantizers
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import CASES, case

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.models.frozen_components import FrozenComponents
from trl_diffusion_sdpo.models.loading import load_model
from trl_diffusion_sdpo.models.numerics import store_channels_last
from trl_diffusion_sdpo.models.pipelines import load_pipeline

GRID = 1 / 64
ACCESS = {
    "local_files_only": True,
    "proxies": {"https": "http://127.0.0.1:9"},
    "token": False,
    "force_download": False,
}
NETWORKS = ("unet", "vae", "text_encoder")


class Method(enum.StrEnum):
    GRID = "grid"


class GridConfig(QuantizationConfigMixin):
    """Weights on a grid: a quantization that needs no package and no accelerator."""

    def __init__(self):
        self.quant_method = Method.GRID

    def to_diff_dict(self):
        return self.to_dict()


class GridQuantizer(DiffusersQuantizer):
    @property
    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_((weight / GRID).round() * GRID)
        return model


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.setitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "grid", GridConfig)
    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "grid", GridQuantizer)
    return GridConfig()


@pytest.fixture
def loaded_with(monkeypatch):
    """`loaded_with(cls)`: the keyword arguments of every call of `cls.from_pretrained` from then on."""

    def spy(cls):
        own, calls = cls.from_pretrained.__func__, []

        @functools.wraps(own)
        def from_pretrained(cls, *args, **kwargs):
            calls.append(kwargs)
            return own(cls, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
        return calls

    return spy


def on_grid(weight: torch.Tensor) -> bool:
    return torch.equal(weight, (weight / GRID).round() * GRID)


def test_a_quantized_base_is_never_loaded_in_full_precision(sd_folder, grid, loaded_with):
    reads = loaded_with(UNet2DConditionModel)
    pipeline = load_model(sd_folder, quantization_config=grid).pipeline
    assert [call.get("quantization_config") for call in reads] == [grid]
    assert all(on_grid(weight) for weight in pipeline.unet.parameters())
    assert not any(on_grid(weight) for weight in pipeline.vae.encoder.conv_in.parameters())
    assert not on_grid(pipeline.text_encoder.get_input_embeddings().weight)


def test_a_lora_trains_on_a_quantized_base(sd_folder, grid, make_args, make_pairs):
    lora = LoraConfig(r=4)
    trainer = DiffusionSDPOTrainer(
        sd_folder, None, make_args(), make_pairs(), peft_config=lora, quantization_config=grid
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0 and first["grad_norm"] > 0
    assert all(on_grid(weight) for name, weight in trainer.denoiser.named_parameters() if "lora_" not in name)


@pytest.fixture
def bare_folder(sd_folder, tmp_path) -> str:
    """A pipeline whose only weights are the denoiser's."""
    folder = Path(shutil.copytree(sd_folder, tmp_path / "bare"))
    for name in NETWORKS[1:]:
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
    return str(folder)


def test_of_a_named_reference_the_denoiser_alone_is_loaded(make_trainer, bare_folder, sd_pipeline):
    trainer = make_trainer(ref_model=bare_folder, max_steps=1)
    reference = trainer.reference.module.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in sd_pipeline.unet.state_dict().items())
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_a_named_reference_is_reached_as_the_policy_but_at_its_own_revision(make_trainer, sd_folder, loaded_with):
    reads = loaded_with(UNet2DConditionModel)
    policy = {**ACCESS, "revision": "of-the-policy", "dtype": "float32", "safety_checker": None}

    def options_of_reference(**settings):
        reads.clear()
        trainer = make_trainer(ref_model=sd_folder, model_init_kwargs=policy, **settings)
        return next(call for call in reads if call.get("subfolder") == "unet"), trainer

    reference, _ = options_of_reference()
    assert {name: reference[name] for name in ACCESS} == ACCESS
    assert reference["torch_dtype"] == torch.float32 and reference["use_safetensors"]
    assert not reference.keys() & {"revision", "safety_checker"}
    own = {"revision": "v2", "token": "hf_other", "dtype": "bfloat16"}
    reference, trainer = options_of_reference(ref_model_init_kwargs=own, bf16=True)
    assert (reference["revision"], reference["token"], reference["torch_dtype"]) == ("v2", "hf_other", torch.bfloat16)
    assert reference["proxies"] == ACCESS["proxies"]
    assert trainer.reference.module.conv_norm_out.weight.dtype == torch.bfloat16
    assert trainer.args.to_dict()["ref_model_init_kwargs"]["token"] == "<TOKEN>"


def test_a_reference_of_another_class_or_in_pickles_is_refused(make_trainer, sdxl_folder, bare_folder):
    with pytest.raises(ValueError, match="`ref_model`"):
        make_trainer(ref_model=sdxl_folder)
    weights = Path(bare_folder) / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="in safetensors files"):
        make_trainer(ref_model=bare_folder)


# ---- Without VAE and text encoders -----------------------------------------------------------------------------------

FEW = ("stable_diffusion_3", "flux2")  # a list of encoders that depends on the folder; statistics in the VAE's weights


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.matrix) for name in CASES]
)
def test_a_pipeline_loads_without_the_weights_of_its_encoders_and_gets_them_when_they_are_used(
    name, family_folder, tmp_path
):
    folder, away = tmp_path / name, tmp_path / "away"
    shutil.copytree(family_folder(name), folder)
    whole = find_family(load_pipeline(folder))
    for part in whole.frozen_components:
        shutil.copytree(folder / part, away / part)
        for file in (folder / part).glob("*.safetensors*"):
            file.unlink()
    loaded = load_model(folder, encoders=False)
    family = loaded.family
    assert family.frozen_components == whole.frozen_components
    assert family.vae_scale_factor == whole.vae_scale_factor and family.default_resolution == whole.default_resolution
    for part in family.frozen_components:
        met, real = (getattr(pipeline, part) for pipeline in (family.pipeline, whole.pipeline))
        assert type(met) is type(real) and all(weight.is_meta for weight in met.parameters())
        assert shapes(met) == shapes(real)

    frozen = FrozenComponents(
        family, device=torch.device("cpu"), half_dtype=None, vae_dtype="auto", load=loaded.load_encoders
    )
    with pytest.raises(ValueError, match="in safetensors files"), frozen.in_use():
        pass
    shutil.copytree(away, folder, dirs_exist_ok=True)
    state = torch.get_rng_state()
    with frozen.in_use() as working:
        encoded = encode(working, case(name).RESOLUTION)
        with frozen.in_use():  # within a use
            pass
        assert not any(weight.is_meta for weight in working.pipeline.vae.parameters())
    store_channels_last(whole.pipeline.vae)  # as in training
    torch.testing.assert_close(encoded, encode(whole, case(name).RESOLUTION), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert frozen.state == "absent" and frozen.family.pipeline.vae is family.pipeline.vae
    assert all(weight.is_meta for weight in frozen.family.pipeline.vae.parameters())


@torch.no_grad()
def encode(family, side):
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels, [torch.Generator().manual_seed(seed) for seed in range(2)])
    return {"latents": latents, **family.encode_prompts(["a red circle", "a square"])}


def shapes(module):
    return {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}
