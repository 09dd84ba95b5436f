"""VQAScore and HPSv3 on tiny image-text models of transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines.parts import nonzero, qwen2_tokenizer, seeded
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
)

from trl_diffusion_sdpo.tools.rewards import load_scorer
from trl_diffusion_sdpo.tools.rewards.hpsv3 import IMAGE_TOKEN, REWARD_TOKEN, reward_head, split_weights

IMAGES = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)) for seed in (0, 1)]
PROMPTS = ["a red circle", "two squares"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    tokenizer = qwen2_tokenizer(("<image>",))
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shared, image_size=28, patch_size=14),
        text_config=Qwen2Config(**shared, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    with seeded(0):
        nonzero(LlavaForConditionalGeneration(config), std=0.3).save_pretrained(path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(path)
    return str(path)


def test_vqa_score_is_the_probability_of_yes(llava):
    scorer = load_scorer("vqa_score", model=llava, dtype=torch.float32)
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    tokenizer = scorer.processor.tokenizer
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        # 4 patches of 14 pixels; the prompt stands in the published question.
        text = f'<|im_start|>{"<image>" * 4}Does this figure show "{prompt}"? Please answer Yes or No.<|im_end|>'
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        with torch.no_grad():
            logits = model(
                input_ids=tokenizer(text, return_tensors="pt").input_ids,
                pixel_values=pixels(image, return_tensors="pt").pixel_values,
            ).logits[0, -1]
        yes = tokenizer.encode("Yes")[0]
        expected.append(float(logits[yes].exp() / logits.exp().sum()))
    assert scorer(IMAGES, PROMPTS).tolist() == pytest.approx(expected, rel=1e-4)
    assert scorer.name.startswith("vqa_score(")


MARKS = ("<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with configuration, tokenizer, image processor and weights as HPSv3 publishes them."""
    path = tmp_path_factory.mktemp("hpsv3")
    tokenizer = qwen2_tokenizer(MARKS, TEMPLATE)
    tokenizer.save_pretrained(path)
    ids = {
        name: tokenizer.convert_tokens_to_ids(mark)
        for name, mark in zip(("start", "end", "image"), MARKS, strict=True)
    }
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer) + 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        image_token_id=ids["image"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
    )
    config.save_pretrained(path)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 4 * 28 * 28}).save_pretrained(path)
    with seeded(0):
        model = nonzero(Qwen2VLModel(config), std=0.3)
        head = reward_head(32)
    old_names = {}
    for name, weight in model.state_dict().items():
        old_names[name.replace("language_model.", "model.")] = weight.contiguous()
    for name, weight in head.state_dict().items():
        old_names[f"rm_head.{name}"] = weight
    old_names["lm_head.weight"] = torch.zeros(3, 3)
    save_file(old_names, path / "HPSv3.safetensors")
    return str(path), model, head


def test_hpsv3_is_the_mean_at_the_reward_token(qwen):
    folder, model, head = qwen
    scorer = load_scorer(
        "hpsv3",
        instruction="Rate it: {text_prompt} <|Reward|>",
        model=folder,
        base=folder,
        dtype=torch.float32,
        device="cpu",
    )
    scorer.image_processor.size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 4 * 28 * 28}
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        pixels = scorer.image_processor(image, return_tensors="pt")
        # 56 x 56 pixels are 16 patches, and 4 of them become one token.
        text = f"<|im_start|><|vision_start|>{IMAGE_TOKEN * 4}<|vision_end|>Rate it: {prompt} {REWARD_TOKEN}<|im_end|>"
        tokens = scorer.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model(
                input_ids=tokens,
                pixel_values=pixels.pixel_values,
                image_grid_thw=pixels.image_grid_thw,
                mm_token_type_ids=(tokens == model.config.image_token_id).int(),
            ).last_hidden_state
        position = tokens[0].tolist().index(scorer.reward_token)
        expected.append(float(head(hidden[0, position]).detach()[0]))
    assert scorer.reward_token == model.config.text_config.vocab_size - 1
    assert scorer(IMAGES, PROMPTS).tolist() == pytest.approx(expected, abs=1e-4)


def test_names_of_both_formats_of_qwen2_vl_are_understood():
    weight = torch.ones(1)
    old = {"visual.a": weight, "model.layers.0": weight, "lm_head.weight": weight, "rm_head.0.weight": weight}
    new = {"model.visual.a": weight, "model.language_model.layers.0": weight, "rm_head.0.weight": weight}
    for weights in (old, new):
        network, head = split_weights(weights)
        assert set(network) == {"visual.a", "language_model.layers.0"}
        assert set(head) == {"0.weight"}


@pytest.mark.parametrize("instruction", ["{text_prompt}", "<|Reward|>"])
def test_an_instruction_needs_prompt_and_reward_token(instruction, qwen):
    with pytest.raises(ValueError, match="instruction"):
        load_scorer("hpsv3", instruction=instruction, model=qwen[0], base=qwen[0])
