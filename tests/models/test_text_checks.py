"""A tokenizer without its vocabulary is refused at the start, for every text encoder of every kind of model."""

import logging
import shutil
from pathlib import Path

import pytest
from tiny_pipelines import CASES
from transformers import PreTrainedModel

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.models.text_checks import check_text_encoding

IN_CI = ("stable_diffusion_xl", "stable_diffusion_3", "z_image")
SETTINGS_ALONE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def text_encoders(pipeline) -> list[str]:
    return [name for name, part in pipeline.components.items() if isinstance(part, PreTrainedModel)]


def without_vocabulary(tokenizer, folder: Path):
    """The tokenizer as it loads when only its settings arrived; `None` where that is an error."""
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        if file.name not in SETTINGS_ALONE:
            file.unlink()
    try:
        return type(tokenizer).from_pretrained(folder)
    except (OSError, ValueError):
        return None


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.matrix) for name in CASES]
)
def test_a_tokenizer_without_its_vocabulary_is_refused(name, family_folder, tmp_path):
    pipeline = load_pipeline(family_folder(name))
    check_text_encoding(find_family(pipeline))
    encoders = text_encoders(pipeline)
    assert encoders
    for encoder in encoders:
        part = encoder.replace("text_encoder", "tokenizer")
        part = part if part in pipeline.components else "processor"
        whole = getattr(pipeline, part)
        broken = without_vocabulary(whole, tmp_path / part)
        if broken is None:  # nothing that could be trained with
            continue
        pipeline.register_modules(**{part: broken})
        with pytest.raises(ValueError, match="vocabulary"):
            check_text_encoding(find_family(pipeline))
        pipeline.register_modules(**{part: whole})


def test_training_does_not_begin_without_a_vocabulary(make_trainer, sd_folder, tmp_path):
    folder = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="vocabulary"):
        make_trainer(str(folder))


def test_long_prompts_are_counted_once_in_the_report_and_not_warned_of_at_every_step(make_trainer, make_pairs, caplog):
    """The tiny tokenizer has a token for each letter, and reads a few of them."""
    diffusers_logger = logging.getLogger("diffusers")
    diffusers_logger.addHandler(caplog.handler)  # diffusers does not pass its records on
    pairs = make_pairs(4).map(lambda row, i: {"prompt": f"{i}" + "abc " * (100 if i < 3 else 0)}, with_indices=True)
    try:
        trainer = make_trainer(train=pairs, max_steps=2)
        trainer.train()
    finally:
        diffusers_logger.removeHandler(caplog.handler)
    limit = trainer.pipeline.tokenizer.model_max_length
    counted = [record.getMessage() for record in caplog.records if "3 of 4 prompts" in record.getMessage()]
    assert (
        len(counted) == 1
        and f"the {limit} tokens" in counted[0]
        and "3 of 4 prompts" in str(trainer.train_dataset.report)
    )
    assert not any("truncated" in record.getMessage() for record in caplog.records)


def test_tokens_without_an_embedding_are_refused_until_there_is_one(family_folder):
    """A prompt with such a token would end the run whenever it is read."""
    pipeline = load_pipeline(family_folder("stable_diffusion"))
    before = len(pipeline.tokenizer)
    pipeline.tokenizer.add_tokens(["<my-cat>"])
    with pytest.raises(ValueError, match=rf"{before + 1} tokens.* {before} embeddings"):
        check_text_encoding(find_family(pipeline))
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    check_text_encoding(find_family(pipeline))
