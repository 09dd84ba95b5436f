"""The size of training images: its forms, what is refused, and that height and width reach the training."""

import pytest


@pytest.mark.parametrize(("value", "settled"), [([1024], [1024, 1024]), ((768, 1344), [768, 1344])])
def test_a_size_becomes_a_height_and_a_width(make_args, value, settled):
    assert make_args(resolution=value).resolution == settled


@pytest.mark.parametrize("value", [7, True, "16", [16, 16, 16], [16, 4], [16.0, 24], {"height": 16}])
def test_what_is_no_size_is_refused(make_args, value):
    with pytest.raises(ValueError, match="`resolution`"):
        make_args(resolution=value)


def test_a_height_and_a_width_are_trained_at(make_trainer):
    seen = []
    trainer = make_trainer(resolution=(16, 24), max_steps=1)
    encoder = trainer.family.pipeline.vae.encoder
    encoder.register_forward_pre_hook(lambda part, args: seen.append(args[0].shape[1:]))
    trainer.train()
    assert seen == [(3, 16, 24)]
