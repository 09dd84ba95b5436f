"""Export of a LoRA in kohya's format, compared with the key rules in the sources of ComfyUI, A1111 and kohya's scripts,
and with diffusers' readers of the format."""

import diffusers.loaders.lora_conversion_utils as conversion
import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline, ZImagePipeline
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import CASES, case

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.saving.lora_export import to_kohya
from trl_diffusion_sdpo.saving.lora_keys import ORIGINAL_MODULES, original_module
from trl_diffusion_sdpo.saving.weights import ranks, split_key

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
EVERY_KIND = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "conv1",
    "proj_in",
    "ff.net.0.proj",
    "time_emb_proj",
    "conv_shortcut",
]


def lora(modules: dict[str, tuple[int, int]], rank: int = 2, **given) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return random factors for modules of shape `(out, in)`, under PEFT's names, and a configuration with scale 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, (rows, columns) in modules.items():
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return weights, LoraConfig(r=rank, **{"lora_alpha": rank, **given})


def delta(weights: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """Return the matrix that PEFT adds to a module, with scale 1."""
    return weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"]


def merged(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Return the matrix that every reader of the format adds: `alpha / r * up @ down`."""
    down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
    return (
        tensors[f"{key}.alpha"] / down.shape[0] * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
    )


def unet_run(make_trainer, folder, tmp_path, **config):
    trainer = make_trainer(folder, peft_config=LoraConfig(target_modules=EVERY_KIND, **config))
    generator = torch.Generator().manual_seed(0)
    for name, weight in trainer.denoiser.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    trainer.save_model()
    return trainer


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    return torch.from_numpy(pipeline("a cat", latents=noise, **options).images)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("sd_folder", {"r": 4, "lora_alpha": 8}),
        ("sdxl_folder", {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 1}}),
    ],
)
def test_diffusers_reads_the_file_of_a_unet_and_draws_the_same(request, make_trainer, tmp_path, family, config):
    """The LoRA covers convolutions and has several ranks."""
    folder = request.getfixturevalue(family)
    trainer = unet_run(make_trainer, folder, tmp_path, **config)
    output = tmp_path / "exported" / "kohya.safetensors"
    assert main(["export", "--run", str(tmp_path / "run"), "--output", str(output)]) == 0

    fresh = load_pipeline(folder)
    base = draw(fresh)
    fresh.load_lora_weights(str(output))
    tuned = draw(trainer.pipeline)
    torch.testing.assert_close(draw(fresh), tuned, rtol=0, atol=1e-5)
    assert not torch.allclose(base, tuned, atol=1e-3)


def test_the_keys_of_a_unet_are_those_that_comfyui_and_the_web_uis_look_for(make_trainer, sd_folder, tmp_path):
    """Keys are `lora_unet_` and diffusers' name with underscores for dots. Sources: ComfyUI, `model_lora_keys_unet`;
    A1111, `convert_diffusers_name_to_compvis`; kohya-ss, `networks/lora.py`."""
    trainer = unet_run(make_trainer, sd_folder, tmp_path, r=4, lora_alpha=1, rank_pattern={"to_q": 2})
    main(["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out.safetensors")])
    tensors = load_file(tmp_path / "out.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"} <= set(tensors)
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    compared = 0
    for name, module in trainer.denoiser.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            torch.testing.assert_close(merged(tensors, key), module.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared * 3 == len(tensors) and compared > 20


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FLUX_WIDTH = 3072  # which diffusers' reader takes for granted
FLUX_BLOCK = {
    **{f"transformer_blocks.0.attn.{name}": (FLUX_WIDTH, 8) for name in ATTENTION},
    **{f"transformer_blocks.0.attn.{name}": (FLUX_WIDTH, 8) for name in ("add_q_proj", "add_k_proj", "add_v_proj")},
    "transformer_blocks.0.attn.to_add_out": (FLUX_WIDTH, 8),
    "transformer_blocks.0.ff.net.0.proj": (4 * FLUX_WIDTH, 8),
    "transformer_blocks.0.ff_context.net.2": (FLUX_WIDTH, 32),
    **{f"single_transformer_blocks.1.attn.{name}": (FLUX_WIDTH, 8) for name in ("to_q", "to_k", "to_v")},
}


def test_diffusers_reads_what_is_written_for_flux():
    weights, config = lora(FLUX_BLOCK, rank=4)
    read = FluxPipeline.lora_state_dict(to_kohya(weights, config, "FluxTransformer2DModel"))
    read = {key.removeprefix("transformer."): value for key, value in read.items()}
    for module in FLUX_BLOCK:
        torch.testing.assert_close(delta(read, module), delta(weights, module), rtol=1e-5, atol=1e-5)
    assert not delta(read, "single_transformer_blocks.1.proj_mlp").any()


@pytest.mark.parametrize(
    ("denoiser", "read", "modules"),
    [
        (
            "Flux2Transformer2DModel",
            conversion._convert_kohya_flux2_lora_to_diffusers,
            {
                **{f"transformer_blocks.0.attn.{name}": (6, 8) for name in ATTENTION},
                "single_transformer_blocks.1.attn.to_qkv_mlp_proj": (27, 8),
                "single_transformer_blocks.1.attn.to_out": (6, 8),
            },
        ),
        (
            "QwenImageTransformer2DModel",
            QwenImagePipeline.lora_state_dict,
            {f"transformer_blocks.12.attn.{name}": (6, 8) for name in ATTENTION},
        ),
        (
            "WanTransformer3DModel",
            conversion._convert_musubi_wan_lora_to_diffusers,
            {
                f"blocks.0.{name}": (6, 8)
                for part in ("attn1", "attn2")
                for name in (*(f"{part}.{to}" for to in ATTENTION), "ffn.net.0.proj", "ffn.net.2")
            },
        ),
        (
            "ZImageTransformer2DModel",
            ZImagePipeline.lora_state_dict,
            {f"layers.3.attention.{name}": (6, 8) for name in ATTENTION},
        ),
    ],
    ids=["flux2", "qwen", "wan", "z_image"],
)
def test_diffusers_reads_what_is_written_for_transformers(denoiser, read, modules):
    weights, config = lora(modules, rank=4, lora_alpha=8)
    got = read(to_kohya(weights, config, denoiser))
    got = {key.removeprefix("transformer."): value for key, value in got.items()}
    for module in modules:
        torch.testing.assert_close(delta(got, module), 2 * delta(weights, module), rtol=1e-5, atol=1e-5)


# Of ComfyUI's tables in `comfy/utils.py`: diffusers' modules in the order of their rows -> the original matrix.
ORIGINAL = {
    "SD3Transformer2DModel": {
        "lora_unet_joint_blocks_7_x_block_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "lora_unet_joint_blocks_7_context_block_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "lora_unet_joint_blocks_7_x_block_attn2_qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
        "lora_unet_joint_blocks_7_x_block_attn_proj": ["attn.to_out.0"],
        "lora_unet_joint_blocks_7_context_block_attn_proj": ["attn.to_add_out"],
        "lora_unet_joint_blocks_7_x_block_mlp_fc1": ["ff.net.0.proj"],
        "lora_unet_joint_blocks_7_context_block_mlp_fc2": ["ff_context.net.2"],
    },
    "FluxTransformer2DModel": {
        "lora_unet_double_blocks_7_img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "lora_unet_double_blocks_7_txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "lora_unet_double_blocks_7_img_attn_proj": ["attn.to_out.0"],
        "lora_unet_double_blocks_7_txt_mlp_2": ["ff_context.net.2"],
    },
    "PixArtTransformer2DModel": {
        "lora_unet_blocks_7_attn_qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
        "lora_unet_blocks_7_cross_attn_kv_linear": ["attn2.to_k", "attn2.to_v"],
        "lora_unet_blocks_7_cross_attn_q_linear": ["attn2.to_q"],
        "lora_unet_blocks_7_mlp_fc2": ["ff.net.2"],
    },
}


@pytest.mark.parametrize("denoiser", ORIGINAL)
def test_rows_lie_in_the_original_matrix_as_comfyui_cuts_it(denoiser):
    places = ORIGINAL[denoiser]
    modules = [f"transformer_blocks.7.{name}" for names in places.values() for name in names]
    weights, config = lora(dict.fromkeys(modules, (5, 8)))
    tensors = to_kohya(weights, config, denoiser)
    assert {name.partition(".")[0] for name in tensors} == set(places)
    for key, names in places.items():
        expected = torch.cat([delta(weights, f"transformer_blocks.7.{name}") for name in names])
        torch.testing.assert_close(merged(tensors, key), expected, rtol=1e-5, atol=1e-5)


def test_names_of_aura_flow_lumina_2_and_z_image():
    """Sources: ComfyUI's `auraflow_to_diffusers` and `z_image_to_diffusers`, and kohya's `lora_lumina.py`."""
    for denoiser, module, key in (
        ("AuraFlowTransformer2DModel", "joint_transformer_blocks.2.attn.to_q", "double_layers_2_attn_w2q"),
        ("AuraFlowTransformer2DModel", "joint_transformer_blocks.2.attn.to_add_out", "double_layers_2_attn_w1o"),
        ("AuraFlowTransformer2DModel", "single_transformer_blocks.2.attn.to_out.0", "single_layers_2_attn_w1o"),
        ("AuraFlowTransformer2DModel", "joint_transformer_blocks.0.ff_context.linear_2", "double_layers_0_mlpC_c_fc2"),
        ("ZImageTransformer2DModel", "noise_refiner.1.attention.to_out.0", "noise_refiner_1_attention_out"),
        ("Lumina2Transformer2DModel", "context_refiner.1.attn.to_out.0", "context_refiner_1_attention_out"),
    ):
        assert f"lora_unet_{key}.alpha" in to_kohya(*lora({module: (6, 8)}), denoiser)


def test_names_of_krea_2_are_the_original_ones_that_diffusers_reads():
    ends = [*(f"attn.{name}" for name in (*ATTENTION, "to_gate")), "ff.gate", "ff.up", "ff.down"]
    for block in ("transformer_blocks.3", "text_fusion.layerwise_blocks.0", "text_fusion.refiner_blocks.1"):
        for module in (f"{block}.{end}" for end in ends):
            original = original_module("Krea2Transformer2DModel", module).module
            tensors = {f"diffusion_model.{original}.lora_A.weight": torch.ones(1)}
            read = conversion._convert_non_diffusers_krea2_lora_to_diffusers(tensors)
            assert list(read) == [f"transformer.{module}.lora_A.weight"]


def test_names_of_ideogram_4_are_the_original_ones_that_diffusers_reads():
    ends = [*(f"attention.{name}" for name in ATTENTION), *(f"feed_forward.w{number}" for number in (1, 2, 3))]
    weights, config = lora({f"layers.0.{end}": (6, 6) for end in ends})
    tensors = to_kohya(weights, config, "Ideogram4Transformer2DModel")
    dotted = {
        key.replace("lora_unet_layers_0_", "layers.0.")
        .replace("attention_", "attention.")
        .replace("feed_forward_", "feed_forward."): value
        for key, value in tensors.items()
    }
    read = conversion._convert_non_diffusers_ideogram4_lora_to_diffusers(dotted)
    for end in ends:
        expected = delta(weights, f"layers.0.{end}")
        up, down = (read[f"transformer.layers.0.{end}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(up @ down, expected, rtol=1e-5, atol=1e-5)


def test_queries_wider_than_keys_lie_above_one_another():
    rows = {"layers.0.attn.to_q": (12, 8), "layers.0.attn.to_k": (4, 8), "layers.0.attn.to_v": (4, 8)}
    weights, config = lora(rows)
    tensors = to_kohya(weights, config, "Lumina2Transformer2DModel")
    expected = torch.cat([delta(weights, name) for name in rows])
    torch.testing.assert_close(merged(tensors, "lora_unet_layers_0_attention_qkv"), expected, rtol=1e-5, atol=1e-5)


def test_parts_without_a_lora_are_zero():
    weights, config = lora({f"transformer_blocks.0.attn.{name}": (5, 8) for name in ("to_q", "to_v")})
    stacked = merged(to_kohya(weights, config, "SD3Transformer2DModel"), "lora_unet_joint_blocks_0_x_block_attn_qkv")
    torch.testing.assert_close(stacked[:5], delta(weights, "transformer_blocks.0.attn.to_q"))
    torch.testing.assert_close(stacked[10:], delta(weights, "transformer_blocks.0.attn.to_v"))
    assert not stacked[5:10].any()


def test_what_the_format_has_no_place_for_is_refused_with_the_reason():
    unknown = lora({"blocks.0.attn.to_q": (4, 4)})
    with pytest.raises(ValueError, match="AuraFlow.*SanaTransformer2DModel"):
        to_kohya(*unknown, "SanaTransformer2DModel")
    with pytest.raises(ValueError, match="the module transformer_blocks.0.norm1_context.linear"):
        to_kohya(*lora({"transformer_blocks.0.norm1_context.linear": (4, 4)}), "SD3Transformer2DModel")
    with pytest.raises(ValueError, match="queries, keys and values"):
        to_kohya(*lora({"layers.0.attn.to_q": (4, 4)}), "Lumina2Transformer2DModel")
    with pytest.raises(ValueError, match="DoRA"):
        to_kohya(*lora({"a": (4, 4)}, use_dora=True), "UNet2DConditionModel")
    weights, config = lora({"a": (4, 4)}, lora_bias=True)
    with pytest.raises(ValueError, match="a.lora_B.bias"):
        to_kohya({**weights, "a.lora_B.bias": torch.ones(4)}, config, "UNet2DConditionModel")


def test_folders_without_a_lora_and_files_that_are_there_are_refused(tmp_path, capsys):
    (tmp_path / "there.safetensors").touch()
    for run, output, said in (
        (tmp_path, "there.safetensors", "must be a new file"),
        (tmp_path, "out.bin", "must be a new file"),
        (tmp_path / "nowhere", "out.safetensors", "must be a folder in which the trainer saved a LoRA"),
    ):
        assert main(["export", "--run", str(run), "--output", str(tmp_path / output)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_exported_by_default_or_refused(name):
    """Either all modules that train by default have a name in the format, or the family has no names."""
    pipeline = case(name).build()
    family = find_family(pipeline)
    denoiser = family.denoiser
    ends = tuple(f".{target}" for target in family.lora_target_modules)
    targets = [(name, module) for name, module in denoiser.named_modules() if f".{name}".endswith(ends)]
    rows = {name: module.weight.shape[0] for name, module in targets if isinstance(module, LAYERS)}
    weights, config = lora({name: (height, 4) for name, height in rows.items()})
    if type(denoiser).__name__ not in ORIGINAL_MODULES:
        assert name in ("sana", "hunyuan_dit", "cogview4", "longcat_image", "ovis_image")
        return
    tensors = to_kohya(weights, config, type(denoiser).__name__)
    assert sum(ranks(weights).values()) == sum(t.shape[0] for key, t in tensors.items() if "lora_down" in key)
    assert split_key("a.b.lora_A.weight") == ("a.b", "lora_A.weight")
