"""CLIP scorers against a second writing of their definitions, and open_clip's weights against open_clip's network."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import SIZE, WIDTH, save_clip
from tiny_pipelines.parts import clip_tokenizer, seeded
from torch import nn
from transformers import CLIPConfig, CLIPModel

from trl_diffusion_sdpo.tools.rewards import load_scorer
from trl_diffusion_sdpo.tools.rewards.open_clip_keys import clip_state_dict

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a red circle", "two blue squares beside a tree", "a"]


def random_image(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


IMAGES = [random_image(64, 64, 0), random_image(96, 40, 1), random_image(40, 72, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model, its tokenizer and its image processor in one folder, as on the Hub."""
    return save_clip(tmp_path_factory.mktemp("clip"))


def pixels_by_hand(image: Image.Image) -> torch.Tensor:
    """Resize the shorter side, crop the centre, normalise: CLIP's recipe in PIL and numpy."""
    ratio = SIZE / min(image.size)
    resized = image.convert("RGB").resize(
        tuple(SIZE if side == min(image.size) else int(side * ratio) for side in image.size), Image.Resampling.BICUBIC
    )
    left = (resized.width - SIZE) // 2
    top = (resized.height - SIZE) // 2
    cropped = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))) / 255
    return torch.tensor(((cropped - MEAN) / STD).transpose(2, 0, 1), dtype=torch.float32)


def cosine_by_hand(model: CLIPModel, image: Image.Image, prompt: str) -> float:
    tokenizer = clip_tokenizer()
    with torch.no_grad():
        vision = model.vision_model(pixel_values=pixels_by_hand(image)[None]).pooler_output
        tokens = torch.tensor([tokenizer(prompt).input_ids[:39] + [tokenizer.eos_token_id]])
        first_end = int((tokens[0] == tokenizer.eos_token_id).int().argmax())
        text = model.text_model(input_ids=tokens).last_hidden_state[:, first_end]
        first = model.visual_projection(vision)[0].double()
        second = model.text_projection(text)[0].double()
    return float(first @ second / (first.norm() * second.norm()))


@pytest.mark.parametrize(
    ("name", "arguments", "formula", "prefix"),
    [
        ("pickscore", ("processor",), lambda cos: math.exp(3.0) * cos, ""),
        ("clip_score", (), lambda cos: cos, ""),
        ("clip_score_hessel", (), lambda cos: 2.5 * max(cos, 0.0), "A photo depicts "),
    ],
)
def test_a_score_is_its_definition(name, arguments, formula, prefix, folder):
    scorer = load_scorer(name, model=folder, **dict.fromkeys(arguments, folder))
    model = CLIPModel.from_pretrained(folder)
    expected = [
        formula(cosine_by_hand(model, image, prefix + prompt)) for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]
    assert scorer.name.startswith(f"{name}(model=")
    assert scorer(IMAGES, PROMPTS).tolist() == pytest.approx(expected, abs=2e-5)


class OpenClipBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 64), "c_proj": nn.Linear(64, WIDTH)})

    def forward(self, x, mask=None):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def transformer() -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList([OpenClipBlock(), OpenClipBlock()])})


class OpenClipVision(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 7, stride=7, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = transformer()
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, 24))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP in open_clip's names and way: one matrix for queries, keys and values, projections on the right."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.visual = OpenClipVision()
        self.token_embedding = nn.Embedding(vocabulary, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(40, WIDTH))
        self.transformer = transformer()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 24))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("attn_mask", torch.full((40, 40), -torch.inf).triu(1))

    def encode_text(self, tokens, end):
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer["resblocks"]:
            x = block(x, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(x)), end] @ self.text_projection


@pytest.fixture(scope="module")
def open_clip():
    with seeded(3), torch.no_grad():
        network = OpenClip(len(clip_tokenizer()))
        for parameter in network.parameters():
            if parameter.dim():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        return network.eval()


@pytest.mark.parametrize(("name", "file"), [("hpsv2.1", "HPS_v2.1_compressed.pt"), ("hpsv2", "HPS_v2_compressed.pt")])
def test_hpsv2_is_the_cosine_of_open_clips_network(name, file, open_clip, folder, tmp_path):
    torch.save({"state_dict": open_clip.state_dict()}, tmp_path / file)
    scorer = load_scorer(name, model=str(tmp_path), processor=folder)
    assert scorer.name.startswith(f"{name}(")
    tokenizer = clip_tokenizer()
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=40, return_tensors="pt").input_ids
    end = torch.tensor([len(tokenizer(prompt).input_ids) - 1 for prompt in PROMPTS])
    with torch.no_grad():
        image = open_clip.visual(torch.stack([pixels_by_hand(image) for image in IMAGES]))
        text = open_clip.encode_text(tokens, end)
    expected = nn.functional.cosine_similarity(image, text)
    assert scorer(IMAGES, PROMPTS).tolist() == pytest.approx(expected.tolist(), abs=2e-5)


def test_weights_of_vit_h_14_have_the_names_and_shapes_of_transformers():
    """The names and shapes that open_clip publishes for ViT-H/14, written by hand."""

    def blocks(prefix, count, width):
        shapes = {
            "ln_1": (width,),
            "ln_2": (width,),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }
        for index in range(count):
            block = f"{prefix}transformer.resblocks.{index}"
            yield f"{block}.attn.in_proj_weight", (3 * width, width)
            yield f"{block}.attn.in_proj_bias", (3 * width,)
            for part, shape in shapes.items():
                yield f"{block}.{part}.weight", shape
                yield f"{block}.{part}.bias", shape[:1]

    published = {
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
        **{f"visual.{name}.{kind}": (1280,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        **dict(blocks("visual.", 32, 1280)),
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "token_embedding.weight": (49408, 1024),
        "ln_final.weight": (1024,),
        "ln_final.bias": (1024,),
        **dict(blocks("", 24, 1024)),
        "attn_mask": (77, 77),
    }
    config = CLIPConfig(
        text_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
        },
        vision_config={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
        },
        projection_dim=1024,
    )
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in published.items()}
        expected = CLIPModel(config).state_dict()
    translated = clip_state_dict(weights)
    assert {name: weight.shape for name, weight in translated.items()} == {
        name: weight.shape for name, weight in expected.items()
    }


def test_weights_that_are_missing_or_unknown_are_an_error(open_clip, folder, tmp_path):
    weights = {**open_clip.state_dict(), "visual.new": torch.ones(1)}
    del weights["text_projection"]
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"hpsv2\.1.*text_projection.*visual\.new"):
        load_scorer("hpsv2.1", model=str(tmp_path), processor=folder)
    torch.save(weights, tmp_path / "HPS_v2.1_compressed.pt")  # another layout
    with pytest.raises(ValueError, match=r"hpsv2\.1.*state_dict"):
        load_scorer("hpsv2.1", model=str(tmp_path), processor=folder)


def test_hpsv2_reads_prompts_as_open_clip_cleans_them(open_clip, folder, tmp_path):
    """The expected text is what ftfy and two rounds of `html.unescape`, as in open_clip's tokenizer, make of it."""
    torch.save({"state_dict": open_clip.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    scorer = load_scorer("hpsv2.1", model=str(tmp_path), processor=folder)
    raw, cleaned = "\u201ca cat\u201d &amp;amp; a dog\u2019s bone", '"a cat" & a dog\'s bone'
    assert scorer(IMAGES[:1], [raw]).equal(scorer(IMAGES[:1], [cleaned]))


def test_scorers_say_what_their_scores_mean(open_clip, folder, tmp_path):
    """PickScore's range is SmPO's published range of its cosines, here times `exp(3)`, as the scores are."""
    scale = load_scorer("pickscore", model=folder, processor=folder).score_scale
    factor = math.exp(3.0)
    assert (scale.low, scale.high) == pytest.approx((0.115435 * factor, 0.282016 * factor))
    assert (scale.lowest, scale.highest, scale.log_odds) == pytest.approx((-factor, factor, 1.0))
    torch.save({"state_dict": open_clip.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    given = {"model": str(tmp_path), "processor": folder}
    assert load_scorer("hpsv2.1", **given).score_scale.log_odds == pytest.approx(factor)  # of cosines
    assert load_scorer("hpsv2.1", **given, scale=2.0).score_scale.log_odds == pytest.approx(factor / 2)
    clipped = load_scorer("clip_score_hessel", model=folder).score_scale
    assert (clipped.lowest, clipped.highest, clipped.log_odds) == (0.0, 2.5, None)


def test_a_pickle_that_runs_code_is_refused(folder, tmp_path):
    torch.save({"state_dict": {"a": print}}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        load_scorer("hpsv2.1", model=str(tmp_path), processor=folder)


def test_padding_keeps_the_whole_image_and_fills_with_black(folder):
    white = Image.new("RGB", (56, 28), "white")
    scorer = load_scorer("clip_score", model=folder, preprocess="pad")
    seen = []
    scorer.model.get_image_features = lambda pixels: (
        seen.append(pixels) or CLIPModel.get_image_features(scorer.model, pixels)
    )
    scorer([white], ["white"])
    rows = (seen[0][0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).mean(dim=(0, 2))
    assert rows.tolist() == pytest.approx([0.0] * 7 + [1.0] * 14 + [0.0] * 7, abs=1e-5)


def test_the_aesthetic_score_is_its_definition_and_ignores_the_prompt(folder, tmp_path):
    with seeded(5):
        layers = [nn.Linear(*sizes) for sizes in ((24, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))]
    names = (0, 2, 4, 6, 7)
    weights = {
        f"layers.{name}.{kind}": value
        for name, layer in zip(names, layers, strict=True)
        for kind, value in layer.state_dict().items()
    }
    torch.save(weights, tmp_path / "aesthetic-model.pth")
    scorer = load_scorer("aesthetic", model=folder, head=str(tmp_path))
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        pixels = torch.stack([pixels_by_hand(image) for image in IMAGES])
        embedding = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        expected = embedding / embedding.norm(dim=1, keepdim=True)
        for layer in layers:
            expected = layer(expected)
    scores = scorer(IMAGES, PROMPTS)
    assert scores.tolist() == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    assert scorer(IMAGES, ["x"] * 3).equal(scores)
    scorer.to("meta")
    assert {weight.device.type for part in (scorer.head, scorer.clip.model) for weight in part.parameters()} == {
        "meta"
    }
    assert scorer.clip.device.type == "meta"
