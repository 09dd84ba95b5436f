"""The model card of a tuned model: how diffusers loads it, its settings, metrics and citations. Cards are public, so
tokens and local folders are left out."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..utils.secrets import names_secret, without_secrets

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TUNINGS = {"lora": "adapter", "full": "finetune"}  # `tuning` -> `base_model_relation` of the Hub
COMMON_TAGS = ("text-to-image", "diffusers", "diffusers-training", "trl-diffusion-sdpo", "diffusion-sdpo", "dpo")
LORA_TAGS = ("lora", "template:sd-lora")

PAPER_BIBTEX = """\
@article{fu2025diffusionsdpo,
  title   = {{Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models}},
  author  = {Fu, Minghao and Wang, Guo-Hua and Cui, Tianyu and Chen, Qing-Guo and Xu, Zhao and Luo, Weihua and Zhang, Kaifu},
  journal = {arXiv preprint arXiv:2511.03317},
  year    = {2025}
}"""  # noqa: E501

DIFFUSION_DPO_BIBTEX = """\
@article{wallace2023diffusiondpo,
  title   = {{Diffusion Model Alignment Using Direct Preference Optimization}},
  author  = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
  journal = {arXiv preprint arXiv:2311.12908},
  year    = {2023}
}"""  # noqa: E501

TRL_BIBTEX = """\
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallou{\\'e}dec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""  # noqa: E501

_PROMPT = "a photo of an astronaut riding a horse"


@dataclass(frozen=True)
class ModelCardFacts:
    """The content of a card.

    Args:
        hub_model_id (`str`, *optional*): Repository of the model; a placeholder if unset.
        base_model (`str`, *optional*): Hub id or folder of the pipeline that was tuned. Of a folder only the name is
            written; only a Hub id becomes metadata.
        pipeline_class (`str`): diffusers class of that pipeline.
        denoiser_name (`str`): Its attribute that was tuned, `"unet"` or `"transformer"`.
        tuning (`str`): `"lora"` or `"full"`.
        loads_lora (`bool`): Whether the pipeline has `load_lora_weights`; PEFT loads the LoRA otherwise.
        full_pipeline (`bool`): Whether a fully tuned model was saved with the pipeline's other components.
        generation_kwargs (`dict[str, Any]`): Arguments of the pipeline's call besides the prompt.
        generated_image (`str`): Expression for one image in the result of the call.
        dataset_name (`str`, *optional*): Hub id or folder of the preference data, as `base_model`.
        tags (`list[str]`): Added to the common ones.
        settings (`dict[str, Any]`): Becomes a table, without tokens at any depth and with the last part of absolute
            paths only. `safeguard="none"` also changes the description of the method.
        defaults (`dict[str, Any]`): Settings that have their defaults; a folded table.
        run (`dict[str, str]`): Facts of the run, such as its hardware; becomes a table.
        metrics (`dict[str, float]`): Final values; becomes a folded table.
        verdict (`str`, *optional*): Sentences on the change of the error on preferred images.
        pictures (`list[tuple[str, str]]`): Paths of plots relative to the repository, each with its title.
        gallery (`list[tuple[str, str]]`): Image paths relative to the repository, each with its prompt.
        comparison (`list[tuple[str, str, str]]`): Prompts, each with the paths of the images before and after training.
        license (`str`, *optional*): The Hub's identifier of the license.

    Raises:
        `ValueError`: If `tuning` is neither of the two, or the path of an image is not relative to the repository.
    """

    model_name: str
    hub_model_id: str | None
    base_model: str | None
    pipeline_class: str
    denoiser_name: str
    tuning: str
    dataset_name: str | None = None
    tags: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    verdict: str | None = None
    pictures: list[tuple[str, str]] = field(default_factory=list)
    gallery: list[tuple[str, str]] = field(default_factory=list)
    comparison: list[tuple[str, str, str]] = field(default_factory=list)
    trainer_name: str = "Diffusion-SDPO"
    paper_id: str = "2511.03317"
    paper_title: str = "Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models"
    paper_bibtex: str = PAPER_BIBTEX
    versions: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    loads_lora: bool = True
    full_pipeline: bool = False
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    generated_image: str = "images[0]"

    def __post_init__(self):
        if self.tuning not in TUNINGS:
            raise ValueError(f"`tuning` must be one of {', '.join(TUNINGS)}; got {self.tuning!r}.")
        compared = (path for _, *paths in self.comparison for path in paths)
        for path in (*(path for path, _ in (*self.gallery, *self.pictures)), *compared):
            if _is_absolute(path) or ".." in PurePosixPath(path).parts:
                raise ValueError(f"An image must lie within the repository, got {path!r}. Give a relative path.")


def build_model_card(facts: ModelCardFacts) -> ModelCard:
    """Build the card from its template, with the Hub's metadata; to be saved as `README.md`."""
    base_is_hub, base = _is_hub_id(facts.base_model), base_for_loading(facts.base_model)
    return ModelCard.from_template(
        _metadata(facts),
        template_path=str(TEMPLATE),
        model_name=_leaf(facts.model_name) or "Tuned model",
        tuning=facts.tuning,
        denoiser_name=facts.denoiser_name,
        pipeline_class=facts.pipeline_class,
        base_text=_link(facts.base_model, "https://huggingface.co/") or "a text-to-image pipeline",
        base_is_local=not base_is_hub,
        base_for_loading=base,
        dataset_text=_link(facts.dataset_name, "https://huggingface.co/datasets/") or "preference pairs",
        has_gallery=bool(facts.gallery),
        snippet=_snippet(facts, base),
        settings_table=_table(("Setting", "Value"), _public_mapping(facts.settings)),
        defaults_table=_table(("Setting", "Value"), _public_mapping(facts.defaults)),
        run_table=_rows(("Run", "Value"), [(name, _text(value)) for name, value in facts.run.items()]),
        comparison_table=_comparison_table(facts),
        pictures=facts.pictures,
        metrics_table=_table(("Metric", "Value"), {name: f"{value:.6g}" for name, value in facts.metrics.items()}),
        verdict=facts.verdict,
        versions=list(facts.versions.items()),
        swapped={**facts.defaults, **facts.settings}.get("swap_labels") is True,
        averaged={**facts.defaults, **facts.settings}.get("ema_decay") is not None,
        safeguarded={**facts.defaults, **facts.settings}.get("safeguard") != "none",
        trainer_name=facts.trainer_name,
        paper_id=facts.paper_id,
        paper_title=facts.paper_title,
        paper_bibtex=facts.paper_bibtex.strip(),
        diffusion_dpo_bibtex=DIFFUSION_DPO_BIBTEX,
        trl_bibtex=TRL_BIBTEX,
    )


def base_for_loading(name: str | None) -> str:
    """A base's name in the card's code: its Hub id, or the last part of a local folder."""
    return (name if _is_hub_id(name) else _leaf(name)) or "path/to/base-pipeline"


def package_versions() -> dict[str, str]:
    """Versions of this package, of the libraries that training depends on, and of Python."""
    names = ("trl-diffusion-sdpo", "torch", "diffusers", "transformers", "peft", "trl")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def final_metrics(history: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The last logged value of every metric of the loss, the errors and the safeguard, by its name. `train_loss` is the
    mean over the run; that of transformers leaves out the steps before the checkpoint that the run resumed from."""
    history = list(history)
    metrics: dict[str, float] = {}
    for entry in history:
        metrics |= {name: value for name, value in entry.items() if "/" in name or name.endswith("loss")}
    mean = mean_loss(history)
    return metrics if mean is None else {**metrics, "train_loss": mean}


def mean_loss(history: Iterable[Mapping[str, float]]) -> float | None:
    """Mean of the training loss over all logged steps; `None` if there are none. An entry with `loss` is a mean over
    the steps since the previous one."""
    total, last = 0.0, 0.0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None


def _metadata(facts: ModelCardFacts) -> ModelCardData:
    optional: dict[str, Any] = {}
    if _is_hub_id(facts.base_model):
        optional |= {"base_model": facts.base_model, "base_model_relation": TUNINGS[facts.tuning]}
    if _is_hub_id(facts.dataset_name):
        optional["datasets"] = [facts.dataset_name]
    if facts.gallery:
        optional["widget"] = [{"text": prompt, "output": {"url": path}} for path, prompt in facts.gallery]
    lora_tags = LORA_TAGS if facts.tuning == "lora" else ()
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=facts.license,
        tags=list(dict.fromkeys((*COMMON_TAGS, *lora_tags, *facts.tags))),
        **optional,
    )


def loading_code(facts: ModelCardFacts, repository: str) -> str:
    """One line of code that loads the tuned weights from a repository or folder, into `pipeline` if it is a LoRA."""
    name, repository = facts.denoiser_name, _quoted(repository)
    if facts.tuning == "lora":
        if facts.loads_lora:
            return f"pipeline.load_lora_weights({repository})"
        return f"pipeline.{name} = PeftModel.from_pretrained(pipeline.{name}, {repository})"
    if facts.full_pipeline:
        return f"pipeline = DiffusionPipeline.from_pretrained({repository})"
    return f'{name} = AutoModel.from_pretrained({repository}, subfolder="{name}")'


def _snippet(facts: ModelCardFacts, base: str) -> str:
    """Code that loads the base pipeline with the tuned weights and generates one image."""
    given = {"prompt": facts.gallery[0][1] if facts.gallery else _PROMPT, **facts.generation_kwargs}
    given = {name: _quoted(value) if isinstance(value, str) else value for name, value in given.items()}
    arguments = ", ".join(f"{name}={value}" for name, value in given.items())
    generate = ['pipeline.to("cuda")', f"image = pipeline({arguments}).{facts.generated_image}"]
    load = loading_code(facts, facts.hub_model_id or f"path/to/{_leaf(facts.model_name) or 'tuned-model'}")
    names, name = ["DiffusionPipeline"], facts.denoiser_name
    if facts.tuning == "lora":
        load = f"pipeline = DiffusionPipeline.from_pretrained({_quoted(base)})\n{load}"
    elif not facts.full_pipeline:
        names = ["AutoModel", *names]
        load = f"{load}\npipeline = DiffusionPipeline.from_pretrained({_quoted(base)}, {name}={name})"
    imports = [f"from diffusers import {', '.join(names)}"]
    if facts.tuning == "lora" and not facts.loads_lora:
        imports.append("from peft import PeftModel")
    return "\n".join([*imports, "", load, *generate])


def _quoted(text: str) -> str:
    """A Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _table(header: tuple[str, str], rows: dict[str, Any]) -> str:
    return _rows(header, [(f"`{name}`", f"`{_cell(value)}`") for name, value in rows.items()])


def _comparison_table(facts: ModelCardFacts) -> str:
    rows = [
        (f"`{_cell(prompt)}`", f"![before training]({before})", f"![after training]({after})")
        for prompt, before, after in facts.comparison
    ]
    return _rows(("Prompt", "Before", "After"), rows)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; nothing if there are no rows."""
    cells = [header, ["---"] * len(header), *rows] if rows else []
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    """The value in one line, without characters that end a table cell or inline code."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") or " "


def _text(value: str) -> str:
    """Text in one line of a table, without HTML."""
    return " ".join(without_secrets(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _public_mapping(values: dict[str, Any]) -> dict[str, Any]:
    """The mapping without secrets and local folders."""
    return {key: _public(value) for key, value in values.items() if not names_secret(str(key))}


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return _public_mapping(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_public(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    return without_secrets(_leaf(value) if _is_absolute(value) else value)


def _is_absolute(path: str) -> bool:
    return path.startswith("~") or PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def _leaf(path: str | None) -> str:
    """Last part of a POSIX or Windows path; the empty string for none."""
    return PureWindowsPath(path).name if path else ""


def _is_hub_id(name: str | None) -> bool:
    """Whether a name is `owner/name` and no local folder; a bare name may be a folder elsewhere."""
    if name is None or name.count("/") != 1 or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _link(name: str | None, site: str) -> str:
    """Markdown link to a Hub id; of anything else, its last part as code."""
    if _is_hub_id(name):
        return f"[{name}]({site}{name})"
    return f"`{_leaf(name)}`" if _leaf(name) else ""
