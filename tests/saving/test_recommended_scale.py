"""The recommended scale on a model card: what is written, what of a user's edits stays, and that the code runs."""

import json
from pathlib import Path

import pytest

from trl_diffusion_sdpo.saving.model_card import ModelCardFacts, build_model_card
from trl_diffusion_sdpo.saving.recommended_scale import MARK, UNCHANGED, with_recommended_scales
from trl_diffusion_sdpo.saving.run_card import CARD_FILE, update_recommended_scales
from trl_diffusion_sdpo.saving.setup import (
    fingerprint,
    forget_recommended_scales,
    read_setup,
    record_recommended_scale,
    still_recommended,
    write_setup,
)

GUIDED = {"recommended_scale": {"weights": 1.0, "prediction": 2.5, "sentence": "Scale 2.5, as 0.6 is above 0.5."}}
SCALED = {"recommended_scale": {"weights": 0.5, "prediction": 1.0, "sentence": "Scale 0.5."}}
OF_BASE = {"repository": "owner/base", "subfolder": "unet"}


def card(**changes):
    facts = {"model_name": "run", "hub_model_id": "owner/run", "base_model": "owner/base", "denoiser_name": "unet"}
    return str(
        build_model_card(
            ModelCardFacts(**{**facts, "pipeline_class": "StableDiffusionPipeline", "tuning": "lora", **changes})
        )
    )


def code_of(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_the_code_of_a_lora_generates_with_guidance_and_the_reason_is_below():
    text = with_recommended_scales(card(), GUIDED)
    assert code_of(text).splitlines() == [
        "from diffusers import DiffusionPipeline",
        f"from trl_diffusion_sdpo import preference_guidance{MARK}",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("owner/base")',
        'pipeline.load_lora_weights("owner/run")',
        'pipeline.to("cuda")',
        f"with preference_guidance(pipeline, scale=2.5):{MARK}",
        '    image = pipeline(prompt="a photo of an astronaut riding a horse").images[0]',
    ]
    after = text.split("```python\n")[1].split("```")[1]
    assert "Scale 2.5, as 0.6 is above 0.5." in after.split("##")[0]


def test_a_scale_of_the_weights_is_that_of_the_adapter():
    lines = code_of(with_recommended_scales(card(), SCALED)).splitlines()
    assert lines[lines.index('pipeline.load_lora_weights("owner/run")') + 1] == (
        f'pipeline.set_adapters("default_0", 0.5){MARK}'
    )
    named = card().replace('("owner/run")', '("owner/run", adapter_name="mine")')
    assert f'pipeline.set_adapters("mine", 0.5){MARK}' in with_recommended_scales(named, SCALED)
    assert code_of(with_recommended_scales(card(tuning="full"), SCALED)) == code_of(card(tuning="full"))


@pytest.mark.parametrize("full_pipeline", [False, True])
def test_fully_tuned_weights_are_guided_from_the_bases_denoiser(full_pipeline):
    recommended = {"recommended_scale": {**GUIDED["recommended_scale"], "reference": OF_BASE}}
    code = code_of(with_recommended_scales(card(tuning="full", full_pipeline=full_pipeline), recommended))
    assert code.count("import AutoModel") == 1
    assert 'reference = AutoModel.from_pretrained("owner/base", subfolder="unet").to(pipeline.device)' in code
    assert "with preference_guidance(pipeline, scale=2.5, reference=reference):" in code
    compile(code, "card", "exec")


@pytest.mark.parametrize("recommended", [GUIDED, SCALED], ids=["guided", "scaled"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_update_is_idempotent_and_can_be_taken_back(recommended, newline):
    plain = card().replace("\n", newline)
    once = with_recommended_scales(plain, recommended)
    assert once != plain and with_recommended_scales(once, recommended) == once
    for other in (GUIDED, SCALED):
        assert with_recommended_scales(once, other) == with_recommended_scales(plain, other)
    assert with_recommended_scales(once, {}) == plain


def test_edits_of_a_user_stay():
    call = 'image = pipeline(prompt="a photo of an astronaut riding a horse").images[0]'
    mine = 'image = pipeline(\n    prompt="my fox",\n    guidance_scale=5.0,\n).images[0]\nimage.save("fox.png")'
    edited = card().replace(call, mine).replace("# run", "# My own title") + "\nAnd my own words.\n"
    text = with_recommended_scales(edited, GUIDED)
    assert with_recommended_scales(text, {}) == edited
    compile(code_of(text), "card", "exec")
    assert '    image = pipeline(\n        prompt="my fox",\n' in text and '\nimage.save("fox.png")\n' in text
    text = text.replace('prompt="my fox"', 'prompt="my cat"')  # within the block
    assert with_recommended_scales(text, SCALED).count('\n    prompt="my cat",') == 1


def test_a_card_without_code_or_with_a_users_own_guidance_gets_the_reason_only():
    text = with_recommended_scales("My words.\n", GUIDED)
    assert text.startswith("My words.\n\n<!--") and "Scale 2.5" in text
    assert with_recommended_scales(text, GUIDED) == text
    own = card().replace("image = pipeline(", "with preference_guidance(pipeline, scale=9.0):\n    image = pipeline(")
    assert code_of(with_recommended_scales(own, GUIDED)) == code_of(own)


def test_nothing_on_the_card_is_html_or_a_secret():
    facts = {"weights": 1.0, "prediction": 1.0, "sentence": "by `a:b` <script> hf_" + "a" * 34}
    text = with_recommended_scales(card(), {"recommended_scale": facts})
    assert "<script>" not in text and "hf_aaa" not in text


def test_a_file_is_updated_by_the_set_up_file_and_bytes_that_are_no_text_stay(tmp_path):
    assert not update_recommended_scales(tmp_path)  # no card
    (tmp_path / CARD_FILE).write_bytes(b"caf\xe9\n")
    write_setup(tmp_path, {"tuning": "lora", **GUIDED})
    assert update_recommended_scales(tmp_path)
    written = (tmp_path / CARD_FILE).read_bytes()
    assert written.startswith(b"caf\xe9\n") and b"Scale 2.5" in written
    forget_recommended_scales(tmp_path)
    update_recommended_scales(tmp_path)
    assert (tmp_path / CARD_FILE).read_bytes().rstrip() == b"caf\xe9" and read_setup(tmp_path) == {"tuning": "lora"}


def test_a_recommendation_lasts_as_long_as_the_weights(tmp_path, make_sd_pipeline):
    weights = make_sd_pipeline().unet.state_dict()
    others = {**weights, "conv_in.bias": weights["conv_in.bias"] + 1}
    write_setup(tmp_path, {"tuning": "full"})
    for average, found in ((False, weights), (True, others)):
        record_recommended_scale(tmp_path, {"weights": 1.0, "of": fingerprint(found)}, average=average)
    assert still_recommended(tmp_path, {False: weights, True: others}).keys() == {
        "recommended_scale",
        "recommended_scale_of_average",
    }
    assert still_recommended(tmp_path, {False: weights, True: weights}).keys() == {"recommended_scale"}
    assert still_recommended(tmp_path, {False: others, True: None}) == {}
    assert json.loads(Path(tmp_path / "diffusion_sdpo_setup.json").read_text())["tuning"] == "full"


SCORED = {"recommended_scale": {**GUIDED["recommended_scale"], "call": {"guidance_scale": 5.0}}}


@pytest.mark.parametrize("weights", [1.0, 0.5])
def test_the_code_generates_with_the_guidance_at_which_the_scale_was_measured(weights):
    prediction = 2.5 if weights == 1 else 1.0
    facts = {**SCORED["recommended_scale"], "weights": weights, "prediction": prediction}
    plain = card(generation_kwargs={"max_sequence_length": 64})
    text = with_recommended_scales(plain, {"recommended_scale": facts})
    lines = code_of(text).splitlines()
    call = '(prompt="a photo of an astronaut riding a horse", max_sequence_length=64, guidance_scale=guidance_scale)'
    assert lines[-1].strip() == f"image = pipeline{call}.images[0]"
    assert f"guidance_scale = 5.0{MARK}" in lines
    assert with_recommended_scales(text, {}) == plain
    assert with_recommended_scales(text, {"recommended_scale": facts}) == text
    compile(code_of(text), "card", "exec")


def test_an_argument_of_a_user_stays():
    mine = 'pipeline("é 🦊", guidance_scale=3.0)'
    edited = card().replace('pipeline(prompt="a photo of an astronaut riding a horse")', mine)
    assert f"    image = {mine}.images[0]" in code_of(with_recommended_scales(edited, SCORED))
    several = edited.replace(mine, 'pipeline(\n    "é 🦊",\n)')
    text = with_recommended_scales(several, SCORED)
    assert '"é 🦊", guidance_scale=guidance_scale,\n' in text and with_recommended_scales(text, {}) == several


def test_imports_over_several_lines_and_strings_of_a_user_are_not_broken():
    imports = "from diffusers import (\n    AutoModel,\n    DiffusionPipeline,\n)"
    edited = card().replace("from diffusers import DiffusionPipeline", imports)
    text = with_recommended_scales(edited, GUIDED)
    assert f"{imports}\nfrom trl_diffusion_sdpo import preference_guidance{MARK}\n" in text
    compile(code_of(text), "card", "exec")
    assert with_recommended_scales(text, {}) == edited
    prompt = '"a photo of an astronaut riding a horse"'
    edited = edited.replace(prompt, '"""a photo\nof an astronaut"""')
    text = with_recommended_scales(edited, GUIDED)
    assert code_of(text) == code_of(edited) and UNCHANGED in text
    edited = card().replace(f"prompt={prompt}", "prompt for prompt in prompts")  # to which no argument can be added
    text = with_recommended_scales(edited, SCORED)
    assert code_of(text) == code_of(edited) and UNCHANGED in text


def test_code_in_which_a_scale_of_the_weights_cannot_be_set_says_so():
    text = with_recommended_scales(card(loads_lora=False), SCALED)
    assert code_of(text) == code_of(card(loads_lora=False)) and text.count(UNCHANGED) == 1
    assert UNCHANGED not in with_recommended_scales(card(), SCALED)


def test_a_distilled_model_is_guided_as_it_was_swept():
    facts = {**GUIDED["recommended_scale"], "distilled": True}
    assert "scale=2.5, allow_distilled=True):" in with_recommended_scales(card(), {"recommended_scale": facts})


def test_newlines_stay_as_they_are():
    mixed = card().replace("\n", "\r\n", 1)
    assert with_recommended_scales(mixed, {}) == mixed
    text = with_recommended_scales(mixed, GUIDED)
    assert text.count("\r\n") == 1 and with_recommended_scales(text, {}) == mixed
