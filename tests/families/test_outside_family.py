"""Families from outside the package: registered by hand or by an entry point, or refused with a reason.

`tests/examples/test_examples.py` trains one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipelines import case, quiet

import trl_diffusion_sdpo
from trl_diffusion_sdpo.families import (
    FAMILIES,
    family_for_class_name,
    find_family,
    known_pipeline_classes,
    register_family,
    registry,
)
from trl_diffusion_sdpo.models.pipelines import load_denoiser, load_pipeline

PATH = "outside_family:OutsideFamily"


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """The outside module can be imported, and no family is registered."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def outside_folder(tmp_path):
    from outside_family import OutsidePipeline, OutsideUNet

    parts = dict(case("stable_diffusion").build().components)
    unet = OutsideUNet.from_config(parts["unet"].config)
    pipeline = quiet(OutsidePipeline(**{**parts, "unet": unet.eval()}, requires_safety_checker=False))
    pipeline.save_pretrained(tmp_path / "model")
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


@pytest.mark.parametrize("declared", ["registered", "entry point"])
def test_a_family_from_outside_is_found_and_its_folder_loads_as_its_own_classes(declared, install, outside_folder):
    if declared == "registered":
        trl_diffusion_sdpo.register_family("OutsidePipeline", PATH)
    else:
        install("outside-family", {"OutsidePipeline": PATH})
    from outside_family import OutsideFamily, OutsidePipeline, OutsideUNet

    assert known_pipeline_classes() == [*FAMILIES, "OutsidePipeline"]
    pipeline = load_pipeline(outside_folder)
    assert type(pipeline) is OutsidePipeline and type(find_family(pipeline)) is OutsideFamily
    denoiser = load_denoiser(outside_folder)
    assert type(denoiser) is OutsideUNet
    assert all(torch.equal(value, pipeline.unet.state_dict()[name]) for name, value in denoiser.state_dict().items())


def test_nothing_is_imported_before_a_pipeline_needs_it(install):
    install("later", {"LaterPipeline": "no_such_package.family:LaterFamily"})
    register_family("SoonPipeline", "another_absent_package:SoonFamily")
    assert {"LaterPipeline", "SoonPipeline"} <= set(known_pipeline_classes())
    assert family_for_class_name("FluxPipeline").name == "FLUX.1"


def test_a_registration_with_replace_wins_over_the_package_and_over_entry_points(install):
    with pytest.raises(ValueError, match="`replace=True`"):
        register_family("StableDiffusionPipeline", PATH)
    install("declaring", {"OutsidePipeline": "no_such_package:Family"})
    for name in ("StableDiffusionPipeline", "OutsidePipeline"):
        register_family(name, PATH, replace=True)
        assert family_for_class_name(name).name == "Outside"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_package:Family", "no_such_package"),
        ("outside_family:Missing", "Missing"),
        ("outside_family:NotAFamily", "subclass of `Family`"),
    ],
)
def test_a_family_that_cannot_be_used_is_refused_with_its_source(path, reason, install):
    install("faulty", {"OutsidePipeline": path})
    with pytest.raises(ValueError, match=reason) as raised:
        family_for_class_name("OutsidePipeline")
    assert "entry point of faulty" in str(raised.value)


def test_a_denoiser_of_another_package_is_not_imported(outside_folder):
    register_family("OutsidePipeline", PATH)
    index = json.loads((outside_folder / "model_index.json").read_text())
    (outside_folder / "model_index.json").write_text(json.dumps({**index, "unet": ["another_package", "OutsideUNet"]}))
    with pytest.raises(ValueError, match="its family"):
        load_denoiser(outside_folder)
    assert "another_package" not in sys.modules


def test_each_family_of_the_package_serves_the_classes_of_its_row_and_a_subclass_elsewhere_inherits_them():
    rows = {}
    for name in FAMILIES:
        rows.setdefault(family_for_class_name(name), []).append(name)
    assert all(list(family.pipeline_classes) == names for family, names in rows.items())
    own = type("FluxFamily", (family_for_class_name("FluxPipeline"),), {"__module__": "flux"})
    assert own.pipeline_classes == ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
