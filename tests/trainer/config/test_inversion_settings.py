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
        ({"step": 5}, "Did you mean `steps`"),
        ({"kind": "renoised"}, "inversion_kwargs: kind.*ddim, renoise"),
        ({"steps": 2.5}, "`steps` of `inversion_kwargs`"),
        ({"steps": 0}, "`steps`.*at least 1"),
        ({"eta": -1}, "`eta`.*-1"),
        ({"eta": True}, "`eta` of `inversion_kwargs`"),
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


def test_training_without_a_measurement_at_drawn_noise_warns(make_args, recwarn):
    with pytest.warns(UserWarning, match="`eval_strategy`"):
        make_args(**INVERSION)
    recwarn.clear()
    make_args(**INVERSION, eval_strategy="steps", eval_steps=1)
    make_args(**INVERSION, winner_budget=0.1)
    assert not [each for each in recwarn if "`eval_strategy`" in str(each.message)]


def test_more_steps_than_timesteps_are_refused(make_trainer):
    with pytest.raises(ValueError, match="`steps` of `inversion_kwargs`.*1001"):
        make_trainer(**INVERSION, inversion_kwargs={"steps": 1001})


def test_the_published_end_needs_a_level_of_the_grid_below_some_timesteps(make_trainer, caplog):
    """The grid of 5 steps: 1, 201, 401, 601, 801."""
    low = {"timestep_range": [0, 2]}
    exact, grid = {"steps": 5}, {"steps": 5, "end": "grid"}
    with pytest.raises(ValueError, match=r"`end: grid`.*0 to 1.*\[1, 201, 401, 601, 801\]"):
        make_trainer(**INVERSION, **low, inversion_kwargs=grid)
    assert (
        make_trainer(**INVERSION, **low, inversion_kwargs=exact).pair_forward.noise_settings.inversion.end == "exact"
    )
    make_trainer(**INVERSION, inversion_kwargs=grid)
    assert "are not above the inversion's first timestep" not in caplog.text  # two of a thousand
    make_trainer(**INVERSION, timestep_range=[0, 4], inversion_kwargs={"end": "grid"})
    assert "50%" in caplog.text


def test_a_flow_has_levels_of_its_own_and_no_variance(make_trainer, family_folder, caplog):
    """The first of 5 levels is shifted to 3/7. A fifth of uniform draws is below it."""
    folder = family_folder("stable_diffusion_3")
    make_trainer(folder, **INVERSION, inversion_kwargs={"steps": 5, "end": "grid"}, weighting_scheme="none")
    assert "20%" in caplog.text and "428.571" in caplog.text
    with pytest.raises(ValueError, match="`eta` of `inversion_kwargs`"):
        make_trainer(folder, **INVERSION, inversion_kwargs={"eta": 0.1})


@pytest.mark.parametrize(("given", "scale"), [("pickscore", 0.166581), ("0.5", 0.5), (2, 2)])
def test_the_scale_of_scores_is_a_number_or_the_name_of_one(make_args, given, scale):
    args = make_args(loss_type="smpo", loss_kwargs={"smpo_score_scale": given})
    assert args.loss_kwargs["smpo_score_scale"] == pytest.approx(scale, abs=1e-12)


def test_another_name_of_a_scale_is_refused(make_args):
    with pytest.raises(ValueError, match="`smpo_score_scale`"):
        make_args(loss_type="smpo", loss_kwargs={"smpo_score_scale": "hps"})
