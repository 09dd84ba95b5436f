"""Settings of noise by inversion and their refusals, and the named scale of scores."""

import pytest

from trl_diffusion_sdpo.families.inversion import InversionSettings

INVERSION = {"noise_source": "inversion"}


def test_the_settings_reach_the_step(make_trainer):
    given = {"kind": "renoise", "steps": 7, "end": "grid", "eta": 0.1}
    found = make_trainer(**INVERSION, inversion_kwargs=given).pair_forward.noise_settings.inversion
    assert found == InversionSettings("renoise", 7, "grid", 0.1)
    assert make_trainer(**INVERSION).pair_forward.noise_settings.inversion == InversionSettings()


def test_a_setting_of_inversion_without_it_warns(make_args):
    with pytest.warns(UserWarning, match="`inversion_kwargs`"):
        make_args(inversion_kwargs={"kind": "renoise"})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"step": 5}, "`inversion_kwargs`.*'step'"),
        ({"steps": "many"}, "`inversion_kwargs`"),
        ({"kind": "renoised"}, "`kind`.*ddim, renoise"),
        ({"steps": 0}, "`steps`.*at least 1"),
        ({"eta": -1}, "`eta`.*-1"),
        ("renoise", "`inversion_kwargs`"),
    ],
)
def test_wrong_keys_and_values_are_named(make_args, given, named):
    with pytest.raises(ValueError, match=named):
        make_args(**INVERSION, inversion_kwargs=given)


def test_numbers_may_be_text_as_yaml_reads_some(make_args):
    args = make_args(**INVERSION, inversion_kwargs={"eta": "1e-1", "kind": "ddim"})
    assert args.inversion_kwargs == {"eta": 0.1, "kind": "ddim"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise_offset": 0.1}, "`noise_offset=0.1`"),
        ({"precompute_ref_errors": True}, "`noise_source='inversion'`"),
    ],
)
def test_what_cannot_act_with_inversion_is_refused(make_args, given, message):
    with pytest.raises(ValueError, match=message):
        make_args(**INVERSION, **given)


def test_a_flow_has_no_variance_to_add(make_trainer, family_folder):
    with pytest.raises(ValueError, match="`eta` of `inversion_kwargs`"):
        make_trainer(family_folder("stable_diffusion_3"), **INVERSION, inversion_kwargs={"eta": 0.1})


@pytest.mark.parametrize(
    ("name", "inversion", "settings"),
    [
        ("flux", {"steps": 1}, {}),  # the only step ends at pure noise, which no image reaches
        ("flux", {"steps": 4}, {"timesteps": [100.0, 200.0]}),  # the first step ends at 250 or above
        ("stable_diffusion", {"steps": 10}, {"timesteps": [1]}),  # the first step ends at 1
    ],
)
def test_an_inversion_that_adds_no_noise_to_any_image_is_refused(
    make_trainer, family_folder, name, inversion, settings
):
    """Training would take clean latents for noisy ones."""
    settings |= INVERSION
    with pytest.raises(ValueError, match="`end: grid`.*100 ?%"):
        make_trainer(family_folder(name), **settings, inversion_kwargs={"end": "grid", **inversion})
    make_trainer(family_folder(name), **settings, inversion_kwargs={"end": "exact", **inversion})


@pytest.mark.parametrize(("timesteps", "share"), [([1, 500], "50%"), ([1, *range(2, 51)], "2%"), (None, None)])
def test_the_share_of_images_without_noise_is_said_from_one_in_a_hundred_on(make_trainer, caplog, timesteps, share):
    """The first inversion step of Stable Diffusion ends at timestep 1. Of all 1000 timesteps, 0 and 1 are 0.2 %."""
    make_trainer(**INVERSION, inversion_kwargs={"end": "grid"}, timesteps=timesteps)
    said = [record.getMessage() for record in caplog.records if "`end: grid`" in record.getMessage()]
    assert len(said) == (share is not None) and all(share in message for message in said)


def test_more_steps_than_the_schedule_has_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"1000.*1001"):
        make_trainer(**INVERSION, inversion_kwargs={"steps": 1001})
    make_trainer(**INVERSION, inversion_kwargs={"steps": 1000})


@pytest.mark.parametrize(("given", "scale"), [("pickscore", 0.166581), ("0.5", 0.5), (2, 2)])
def test_the_scale_of_scores_is_a_number_or_the_name_of_one(make_args, given, scale):
    args = make_args(loss_type="smpo", loss_kwargs={"smpo_score_scale": given})
    assert args.loss_kwargs["smpo_score_scale"] == pytest.approx(scale, abs=1e-12)


def test_another_name_of_a_scale_is_refused(make_args):
    with pytest.raises(ValueError, match="`smpo_score_scale`"):
        make_args(loss_type="smpo", loss_kwargs={"smpo_score_scale": "hps"})
