"""ImageReward against BLIP written a second time, in the names of the published file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines.parts import seeded
from torch import nn
from transformers import BertTokenizer, BlipVisionConfig, BlipVisionModel, CLIPImageProcessorPil
from transformers import BlipTextModel as TextModel

from trl_diffusion_sdpo.tools.rewards import image_reward, load_scorer
from trl_diffusion_sdpo.tools.rewards.aesthetic import linear_head
from trl_diffusion_sdpo.tools.rewards.image_reward import load_weights, published_vision, text_config

WIDTH = 32
PROMPTS = ["a red circle", " ".join(["square"] * 60)]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
# The keys of the published `med_config.json`, with small sizes.
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 12,
    "encoder_width": WIDTH,
    "add_cross_attention": True,
}


class Block(nn.Module):
    """A block of BLIP's image encoder, in timm's names."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 64), "fc2": nn.Linear(64, WIDTH)})

    def forward(self, x):
        # (N, tokens, 3D) -> three of (N, heads, tokens, D / heads)
        query, key, value = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        )
        weights = (query @ key.transpose(-1, -2) / (WIDTH // 2) ** 0.5).softmax(dim=-1)
        x = x + self.attn["proj"]((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ImageEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 7, stride=7)})
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def attend(weights, name, x, source, allowed):
    """Attention with residual and norm in BERT's names; `allowed` is False where a token may not be seen."""

    def linear(part, value):
        return value @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]

    query, key, value = (
        linear(f"self.{part}", of).unflatten(-1, (2, -1)).transpose(1, 2)
        for part, of in (("query", x), ("key", source), ("value", source))
    )
    scores = (query @ key.transpose(-1, -2) / (WIDTH // 2) ** 0.5).masked_fill(~allowed[:, None, None], -torch.inf)
    context = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    return norm(weights, f"{name}.output.LayerNorm", x + linear("output.dense", context))


def norm(weights, name, x):
    return nn.functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)


def encode_prompts(weights, tokens, mask, image):
    """BERT with cross-attention to the image, written from the weights' names."""
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(weights, "embeddings.LayerNorm", x)
    seen = torch.ones(image.shape[:2], dtype=torch.bool)
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        x = attend(weights, f"{layer}.attention", x, x, mask.bool())
        x = attend(weights, f"{layer}.crossattention", x, image, seen)
        inner = x @ weights[f"{layer}.intermediate.dense.weight"].T + weights[f"{layer}.intermediate.dense.bias"]
        outer = nn.functional.gelu(inner) @ weights[f"{layer}.output.dense.weight"].T
        x = norm(weights, f"{layer}.output.LayerNorm", x + outer + weights[f"{layer}.output.dense.bias"])
    return x


def tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "of", "two"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer.from_pretrained(folder)


def test_a_score_is_blip_and_the_head(tmp_path, monkeypatch):
    with seeded(1):
        encoder = ImageEncoder().eval()
        text = TextModel(text_config(MED_CONFIG), add_pooling_layer=False)
        head = linear_head(WIDTH)
        for parameter in text.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3
    published = {
        **{f"blip.visual_encoder.{name}": weight for name, weight in encoder.state_dict().items()},
        **{f"blip.text_encoder.{name}": weight for name, weight in text.state_dict().items()},
        "blip.text_encoder.embeddings.position_ids": torch.arange(48)[None],
        **{f"mlp.{name}": weight for name, weight in head.state_dict().items()},
    }
    sizes = {"image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-6}
    vision = BlipVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **sizes
    )
    monkeypatch.setattr(image_reward, "published_vision", lambda: vision)
    torch.save(published, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED_CONFIG))
    tokenizer(tmp_path).save_pretrained(tmp_path / "tokenizer")
    scorer = load_scorer("image_reward", model=str(tmp_path), tokenizer=str(tmp_path / "tokenizer"))
    scorer.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)) for seed in (0, 1)]

    # [CLS] a red circle [SEP] and padding; [CLS], 33 times "square", [SEP]: 35 tokens.
    tokens = torch.tensor([[2, 5, 6, 8, 3] + [0] * 30, [2] + [9] * 33 + [3]])
    pixels = [torch.tensor(((np.asarray(image) / 255 - MEAN) / STD).transpose(2, 0, 1)).float() for image in images]
    with torch.no_grad():
        image = encoder(torch.stack(pixels))
        first = encode_prompts(text.state_dict(), tokens, tokens != 0, image)[:, 0]
        raw = head["layers"](first)[:, 0]
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    assert scorer(images, PROMPTS).tolist() == pytest.approx(expected.tolist(), abs=2e-5)
    scorer.batch_size = 1
    assert scorer(images[::-1], PROMPTS[::-1]).tolist() == pytest.approx(expected.tolist()[::-1], abs=2e-5)


def test_weights_of_blip_have_the_names_and_shapes_of_transformers():
    """The names and shapes that BLIP publishes for ViT-L/16 and for BERT with cross-attention, written by hand."""

    def both(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    image = {
        "cls_token": (1, 1, 1024),
        "pos_embed": (1, 197, 1024),
        **both("patch_embed.proj", 1024, 3, 16, 16),
        **both("norm", 1024),
    }
    for index in range(24):
        block = f"blocks.{index}"
        image |= both(f"{block}.norm1", 1024) | both(f"{block}.norm2", 1024)
        image |= both(f"{block}.attn.qkv", 3072, 1024) | both(f"{block}.attn.proj", 1024, 1024)
        image |= both(f"{block}.mlp.fc1", 4096, 1024) | both(f"{block}.mlp.fc2", 1024, 4096)
    words = {
        "embeddings.position_ids": (1, 512),
        "embeddings.word_embeddings.weight": (30524, 768),
        "embeddings.position_embeddings.weight": (512, 768),
        **both("embeddings.LayerNorm", 768),
    }
    for index in range(12):
        layer = f"encoder.layer.{index}"
        for attention, source in (("attention", 768), ("crossattention", 1024)):
            words |= both(f"{layer}.{attention}.self.query", 768, 768)
            words |= both(f"{layer}.{attention}.self.key", 768, source)
            words |= both(f"{layer}.{attention}.self.value", 768, source)
            words |= both(f"{layer}.{attention}.output.dense", 768, 768)
            words |= both(f"{layer}.{attention}.output.LayerNorm", 768)
        words |= both(f"{layer}.intermediate.dense", 3072, 768) | both(f"{layer}.output.dense", 768, 3072)
        words |= both(f"{layer}.output.LayerNorm", 768)
    sizes = zip((0, 2, 4, 6, 7), ((1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True)
    head = {name: shape for index, size in sizes for name, shape in both(f"layers.{index}", *size).items()}
    config = {
        **MED_CONFIG,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 30524,
        "encoder_width": 1024,
    }
    with torch.device("meta"):
        networks = (
            BlipVisionModel(published_vision()),
            TextModel(text_config(config), add_pooling_layer=False),
            linear_head(768),
        )
        weights = {
            f"{tower}.{name}": torch.empty(shape)
            for tower, shapes in {"blip.visual_encoder": image, "blip.text_encoder": words, "mlp": head}.items()
            for name, shape in shapes.items()
        }
    load_weights(weights, *networks)  # missing, unknown and ill-shaped weights are errors
