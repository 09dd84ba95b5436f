"""A CLIP model of transformers' real class with random weights, for scorers."""

from tiny_pipelines.parts import clip_tokenizer, seeded
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

SIZE = 28
WIDTH = 32


def clip_config(activation: str = "gelu") -> CLIPConfig:
    tokenizer = clip_tokenizer()
    shared = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 40,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": SIZE, "patch_size": 7}
    return CLIPConfig(
        text_config={**shared, **text, "hidden_act": activation},
        vision_config={**shared, **vision, "hidden_act": activation},
        projection_dim=24,
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def save_clip(path, seed: int = 0, logit_scale: float = 3.0) -> str:
    """Save a CLIP model, its tokenizer and its image processor in one folder, as on the Hub."""
    with seeded(seed):
        model = CLIPModel(clip_config())
    model.logit_scale.data.fill_(logit_scale)
    for part in (model, clip_tokenizer(), image_processor()):
        part.save_pretrained(path)
    return str(path)
