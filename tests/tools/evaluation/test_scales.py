"""A model at several scales of its weights and of preference guidance."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from trl_diffusion_sdpo import Candidate, evaluate_models, preference_guidance
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings, image_path
from trl_diffusion_sdpo.tools.evaluation.scales import at_scales, recommended_scale, scaled

PROMPTS = [f"prompt {index}" for index in range(8)]
CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}
PATTERN = np.array([[-0.1], [0.1], [-0.2], [0.2], [-0.3], [0.3], [0.0], [0.0]])


def by_scale(images, prompts):
    """A score that needs no model: the change of the first pixel's red from a middle grey."""
    return [abs(float(image.getpixel((0, 0))[0]) - 128) for image in images]


# ---- The rule --------------------------------------------------------------------------------------------------------


def test_the_smallest_scale_within_a_standard_error_of_the_best_is_recommended():
    best = np.ones((8, 1))
    two_worse = best - 0.8 * (np.arange(8) > 5)[:, None]  # mean drop 0.2, with a standard error of 0.131
    assert recommended_scale({1.0: two_worse, 2.0: best}) == 2.0
    uneven = best + np.array([0.0] * 6 + [-1.0, 0.9])[:, None]  # mean drop 0.0125, with a standard error of 0.18
    assert recommended_scale({1.0: uneven, 2.0: best}) == 1.0
    assert recommended_scale({0.0: best + PATTERN, 1.0: best + PATTERN, 2.0: PATTERN}) == 0.0


def test_a_scale_is_recommended_over_the_base_only_beyond_the_95_percent_interval():
    """By hand: PATTERN has the standard deviation .2 and the standard error .0707, and t(7) is 2.365: .167."""
    for gain, scale in ((0.16, 0.0), (0.17, 1.0)):
        assert recommended_scale({0.0: PATTERN * 0, 1.0: PATTERN + gain}) == scale


def test_seeds_are_averaged_and_eight_prompts_with_scores_are_needed():
    two_seeds = np.hstack([PATTERN, PATTERN])
    assert recommended_scale({1.0: two_seeds, 2.0: two_seeds + 1}) == 2.0
    two_seeds[0, 0] = np.nan
    assert recommended_scale({1.0: two_seeds, 2.0: two_seeds + 1}) == 2.0
    two_seeds[0, 1] = np.nan
    assert recommended_scale({1.0: two_seeds, 2.0: two_seeds + 1}) is None


# ---- Images ----------------------------------------------------------------------------------------------------------


def tuned_pipeline(sd_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return pipeline


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, make_pairs, sd_folder):
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    folder = tmp_path_factory.mktemp("run")
    args = DiffusionSDPOConfig(
        str(folder), max_steps=2, learning_rate=1e-1, save_strategy="no", report_to="none", use_cpu=True
    )
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"])
    trainer = DiffusionSDPOTrainer(sd_folder, None, args, make_pairs(4), peft_config=lora)
    trainer.train()
    trainer.save_model()
    return folder


def image_of(pipeline, prompt):
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(pipeline(prompt, generator=ImageSettings().generator(prompt, 0), **CALL).images[0]).astype(int)


def found_in(folder, name):
    with Image.open(image_path(folder, name, 1, 0)) as image:
        return np.asarray(image).astype(int)


def evaluate(folder, models, tmp_path, *more):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["evaluate", "--models", *models, "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    words += ["--scorers", f"{__name__}:by_scale", "--call_kwargs", json.dumps(CALL), "--output_dir", str(folder)]
    return main([*words, *map(str, more)])


def test_a_run_at_scales_of_its_weights_is_what_plain_diffusers_draws(sd_folder, lora_run, tmp_path, capsys):
    models = [f"base={sd_folder}", f"tuned={lora_run}"]
    assert evaluate(tmp_path / "out", models, tmp_path, "--scales", 2, 0.5, "--form", "weights") == 0
    plain = StableDiffusionPipeline.from_pretrained(sd_folder)
    plain.load_lora_weights(lora_run)
    for scale in (0.5, 2):
        plain.set_adapters(plain.get_active_adapters(), [scale])
        assert abs(found_in(tmp_path / "out", f"tuned-{scale:g}") - image_of(plain, PROMPTS[1])).max() <= 1
    assert abs(found_in(tmp_path / "out", "tuned-2") - found_in(tmp_path / "out", "base")).max() > 1
    sweep = json.loads((tmp_path / "out" / "results.json").read_text())["sweeps"][0]
    assert list(sweep["names"].values()) == ["base", "tuned-0.5", "tuned-2"] and sweep["name"] == "tuned"
    recommended = next(iter(sweep["recommended"].values()))
    assert ModelCard.load(lora_run / "README.md").data.recommended_scale == {
        "weights": recommended,
        "guidance_scale": CALL["guidance_scale"],
    }
    assert f"is {recommended:g}" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tuned by scale of the weights" in page and page.count('class="row"') == 6


def test_guidance_of_a_model_without_a_lora_starts_from_the_first_model(sd_folder, tmp_path):
    tuned_pipeline(sd_folder).save_pretrained(tmp_path / "tuned")
    models = [f"base={sd_folder}", f"tuned={tmp_path / 'tuned'}"]
    assert evaluate(tmp_path / "out", models, tmp_path, "--scales", 1, 3, "--interval", 0.5, 1) == 0
    tuned, base = tuned_pipeline(sd_folder), StableDiffusionPipeline.from_pretrained(sd_folder)
    plain = image_of(tuned, PROMPTS[1])
    with preference_guidance(tuned, 3.0, reference=base.unet, interval=(0.5, 1.0)):
        guided = image_of(tuned, PROMPTS[1])
    assert abs(found_in(tmp_path / "out", "tuned-1") - plain).max() <= 1
    assert abs(found_in(tmp_path / "out", "tuned-3") - guided).max() <= 1
    assert abs(plain - guided).max() > 1


def test_all_weights_are_scaled_from_the_base_and_restored_exactly(sd_folder, sdxl_folder):
    base, pipeline = StableDiffusionPipeline.from_pretrained(sd_folder).unet, tuned_pipeline(sd_folder)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    candidate = Candidate("tuned", pipeline, scale=3.0, form="weights")
    with scaled(candidate, pipeline, pipeline.unet, base):
        for name, tensor in pipeline.unet.state_dict().items():
            start = base.state_dict()[name]
            torch.testing.assert_close(tensor, start + 3 * (before[name] - start))
    after = pipeline.unet.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_weights_of_a_dora_are_not_scaled(sd_pipeline):
    """PEFT would multiply its factors, but its weights are no linear function of them."""
    sd_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    candidate = Candidate("tuned", sd_pipeline, scale=2.0, form="weights")
    with (
        pytest.raises(ValueError, match="tuned.*form='guidance'"),
        scaled(candidate, sd_pipeline, sd_pipeline.unet, None),
    ):
        pass


def test_the_lora_of_a_base_is_part_of_its_weights(sd_folder):
    """Only weights without a LoRA were read before, so the scaled model started from another base."""
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipeline, with_lora, merged = (StableDiffusionPipeline.from_pretrained(sd_folder) for _ in range(3))
    torch.manual_seed(0)
    with_lora.unet.add_adapter(lora)
    merged.unet.add_adapter(lora)
    merged.unet.load_state_dict(with_lora.unet.state_dict())
    merged.fuse_lora()
    merged.unload_lora_weights()
    before = {name: tensor.clone() for name, tensor in with_lora.unet.state_dict().items()}
    with scaled(Candidate("tuned", pipeline, scale=0.25, form="weights"), pipeline, pipeline.unet, with_lora.unet):
        found = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    for name, start in merged.unet.state_dict().items():
        torch.testing.assert_close(found[name], start + 0.25 * (pipeline.unet.state_dict()[name] - start))
    after = with_lora.unet.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # the base is not changed


def test_loaded_pipelines_are_as_they_were_after_an_evaluation_which_can_therefore_continue(sd_folder, tmp_path):
    base, tuned = (StableDiffusionPipeline.from_pretrained(sd_folder) for _ in range(2))
    tuned.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    ways = [Candidate(form, tuned, scale=2.0, form=form) for form in ("guidance", "weights")]
    other = Candidate("full", tuned_pipeline(sd_folder), scale=2.0, form="weights")
    candidates = [Candidate("base", base), *ways, other]
    for protocol in (None, None, "authors", "authors"):
        settings = ImageSettings(call_kwargs=CALL, protocol=protocol)
        evaluate_models(candidates, PROMPTS[:1], [], tmp_path / str(protocol), settings)


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_another_architecture_is_no_base(sd_folder, sdxl_folder):
    from diffusers import UNet2DConditionModel

    pipeline = tuned_pipeline(sd_folder)
    other = UNet2DConditionModel.from_pretrained(sdxl_folder, subfolder="unet")
    candidate = Candidate("tuned", pipeline, scale=2.0, form="weights")
    with pytest.raises(ValueError, match="tuned"), scaled(candidate, pipeline, pipeline.unet, other):
        pass


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"scale": 0.0}, "0.0"),
        ({"scale": float("nan")}, "nan"),
        ({"form": "both"}, "both"),
        ({"interval": (1, 0)}, "1"),
    ],
)
def test_a_scale_out_of_range_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Candidate("tuned", "run", **wrong)


def test_a_model_with_a_scale_takes_no_others():
    with pytest.raises(ValueError, match="tuned"):
        at_scales(Candidate("tuned", "run", scale=2.0), [1.0, 2.0])
