"""The size of training images has one form, whether it comes from Python, a command line or YAML."""

import pytest
import yaml

from trl_diffusion_sdpo.cli import train


@pytest.fixture
def given_by(make_args, tmp_path):
    """`given_by(source, value)`: what `resolution` is after it was given there."""

    def build(source, value):
        if source == "python":
            return make_args(resolution=value).resolution
        words = ["--use_cpu", "--output_dir", str(tmp_path / "run")]
        if source == "command line":
            sides = value if isinstance(value, (list, tuple)) else [value]
            words += ["--resolution", *map(str, sides)]
        else:
            file = tmp_path / "run.yaml"
            file.write_text(yaml.safe_dump({"resolution": list(value) if isinstance(value, tuple) else value}))
            words += ["--config", str(file)]
        return train.parse(words)[1].resolution

    return build


@pytest.mark.parametrize("source", ["python", "command line", "yaml"])
@pytest.mark.parametrize(
    ("value", "settled"),
    [([1024], [1024, 1024]), ((768, 1344), [768, 1344])],
)
def test_a_size_is_the_same_wherever_it_is_given(given_by, source, value, settled):
    assert given_by(source, value) == settled


@pytest.mark.parametrize("value", [7, True, "16", [16, 16, 16], [16, 4], [16.0, 24], {"height": 16}])
def test_what_is_no_size_is_refused(make_args, value):
    with pytest.raises(ValueError, match="`resolution`"):
        make_args(resolution=value)


def test_a_height_and_a_width_are_trained_at_saved_and_resumed(make_trainer, caplog):
    met = []

    def trainer(steps):
        made = make_trainer(resolution=(16, 24), max_steps=steps, save_strategy="steps", save_steps=1)
        made.family.pipeline.vae.encoder.register_forward_pre_hook(lambda part, args: met.append(args[0].shape[1:]))
        return made

    trainer(1).train()
    trainer(2).train(resume_from_checkpoint=True)
    assert met == [(3, 16, 24), (3, 16, 24)]
    assert "Resuming with another `resolution`" not in caplog.text
