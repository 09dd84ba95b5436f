"""Families from outside the package: registered by hand or by an entry point, refused with a reason, and trained."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipelines import case, quiet

import trl_diffusion_sdpo
from trl_diffusion_sdpo.families import (
    FAMILIES,
    as_text_to_image,
    family_for_class_name,
    find_family,
    known_pipeline_classes,
    load_denoiser,
    load_pipeline,
    register_family,
    registry,
)

PATH = "outside_family.family:OutsideFamily"
FLUX = "trl_diffusion_sdpo.families.flux:FluxFamily"


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """The outside package can be imported, and no family is registered."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def outside_pipeline():
    from outside_family.pipeline import OutsidePipeline, OutsideUNet

    parts = dict(case("stable_diffusion").build().components)
    unet = OutsideUNet.from_config(parts["unet"].config)
    unet.load_state_dict(parts["unet"].state_dict())
    return quiet(OutsidePipeline(**{**parts, "unet": unet.eval()}, requires_safety_checker=False))


@pytest.fixture
def outside_folder(outside_pipeline, tmp_path):
    outside_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(package, {pipeline class: family})`: a package whose metadata declare entry points, on `sys.path`."""

    def installed(package, families):
        site = tmp_path / f"site_{package}"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {family}" for name, family in families.items()]
        (info / "entry_points.txt").write_text("\n".join(["[trl_diffusion_sdpo.families]", *lines]) + "\n")
        monkeypatch.syspath_prepend(site)

    return installed


# ---- Found and trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", ["registered", "entry point"])
def test_a_family_from_outside_is_found_and_its_folder_loads_as_its_own_classes(declared, install, outside_folder):
    if declared == "registered":
        trl_diffusion_sdpo.register_family("OutsidePipeline", PATH)
    else:
        install("outside-family", {"OutsidePipeline": PATH})
    from outside_family.family import OutsideFamily
    from outside_family.pipeline import OutsidePipeline, OutsideUNet

    assert family_for_class_name("OutsidePipeline") is OutsideFamily
    assert known_pipeline_classes() == [*FAMILIES, "OutsidePipeline"]
    pipeline = load_pipeline(outside_folder)
    assert type(pipeline) is OutsidePipeline and as_text_to_image(pipeline) is pipeline
    assert type(find_family(pipeline)) is OutsideFamily
    denoiser = load_denoiser(outside_folder)
    assert type(denoiser) is OutsideUNet
    assert all(torch.equal(value, pipeline.unet.state_dict()[name]) for name, value in denoiser.state_dict().items())


def test_its_prediction_is_what_its_pipeline_hands_to_the_scheduler(outside_pipeline):
    register_family("OutsidePipeline", PATH)
    family, calls = find_family(outside_pipeline), []
    step = outside_pipeline.scheduler.step

    def record(model_output, timestep, sample, **named):
        calls.append((model_output, timestep, sample))
        return step(model_output, timestep, sample, **named)

    outside_pipeline.scheduler.step = record
    with torch.no_grad():
        outside_pipeline("a cat", num_inference_steps=3, guidance_scale=1.0, height=16, width=16, output_type="latent")
        conditioning = family.encode_prompts(["a cat"])
        plain, _ = super(type(outside_pipeline), outside_pipeline).encode_prompt("a cat", "cpu", 1, False)
        assert not torch.equal(conditioning["prompt_embeds"], plain)  # it has the style
        for model_output, timestep, sample in calls:
            predicted = family.predict(family.denoiser, sample, timestep.view(1), conditioning)
            torch.testing.assert_close(predicted, model_output)
    assert len(calls) == 3


def test_it_trains_a_step_from_its_folder_and_is_saved(outside_folder, make_trainer, tmp_path):
    register_family("OutsidePipeline", PATH)
    trainer = make_trainer(
        str(outside_folder), str(outside_folder), resolution=16, max_steps=1, safeguard="parameter", learning_rate=1e-2
    )
    before = {name: value.clone() for name, value in trainer.denoiser.state_dict().items()}
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["rewards/margins"] == 0 and log["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert trainer.args.beta == 5000.0 and trainer.args.safeguard_mu == 0.6  # of the family's table
    assert any(not torch.equal(value, before[name]) for name, value in trainer.denoiser.state_dict().items())
    trainer.save_model()
    saved = type(trainer.family.denoiser).from_pretrained(tmp_path / "run", subfolder="unet")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in trainer.denoiser.state_dict().items())


def test_nothing_is_imported_before_a_pipeline_needs_it(install):
    install("later", {"LaterPipeline": "no_such_package.family:LaterFamily"})
    register_family("SoonPipeline", "another_absent_package:SoonFamily")
    assert {"LaterPipeline", "SoonPipeline"} <= set(known_pipeline_classes())
    assert family_for_class_name("FluxPipeline").name == "FLUX.1"
    assert not {"no_such_package", "another_absent_package"} & sys.modules.keys()


# ---- Precedence ----------------------------------------------------------------------------------------------------


def test_a_registration_with_replace_wins_over_the_package_and_over_entry_points(install):
    with pytest.raises(ValueError, match="`replace=True`"):
        register_family("StableDiffusionPipeline", PATH)
    register_family("StableDiffusionPipeline", PATH, replace=True)
    assert family_for_class_name("StableDiffusionPipeline").name == "Outside"
    install("declaring", {"OutsidePipeline": "no_such_package:Family"})
    register_family("OutsidePipeline", PATH, replace=True)
    assert family_for_class_name("OutsidePipeline").name == "Outside"


# ---- Refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_package:Family", "no_such_package"),
        ("outside_family.family:Missing", "Missing"),
        ("outside_family.family:NotAFamily", "subclass of `Family`"),
        ("outside_family.family:torch", "subclass of `Family`"),
    ],
)
def test_a_family_that_cannot_be_used_is_refused_with_its_source(path, reason, install):
    install("faulty", {"OutsidePipeline": path})
    with pytest.raises(ValueError, match=reason) as raised:
        family_for_class_name("OutsidePipeline")
    assert "entry point of faulty" in str(raised.value)


@pytest.mark.parametrize("library", ["outside_family_too", "outside_family.absent"])
def test_a_denoiser_of_another_package_is_not_imported(outside_folder, library):
    register_family("OutsidePipeline", PATH)
    index = json.loads((outside_folder / "model_index.json").read_text())
    assert index["unet"] == ["outside_family.pipeline", "OutsideUNet"]
    (outside_folder / "model_index.json").write_text(json.dumps({**index, "unet": [library, "OutsideUNet"]}))
    with pytest.raises(ValueError, match="its family|could not be imported"):
        load_denoiser(outside_folder)
    assert library not in sys.modules
