"""What a person reads names things that exist: make targets, packages, Hub ids, files and links."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_diffusion_sdpo"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = (".ci", ".github", "benchmarks", "docs", "docs_build", "examples", "tests", PACKAGE.name)
PATHS = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
FILES = {path.relative_to(ROOT).as_posix(): path for path in PATHS if path.is_file()}
# Read by people. The changelog may name what was.
KINDS = (".md", ".yaml", ".yml", ".ipynb", ".toml", ".cff", "Makefile", "Dockerfile", ".ci/run")
TEXTS = {
    name: path.read_text(encoding="utf-8")
    for name, path in FILES.items()
    if (name.endswith(KINDS) or name.startswith("examples/scripts/"))
    and not name.startswith(("tests/", PACKAGE.name, "CHANGELOG"))
    and "__pycache__" not in name
}
for name in [name for name in TEXTS if name.endswith(".ipynb")]:
    TEXTS[name] = "\n".join("".join(cell["source"]) for cell in json.loads(TEXTS[name])["cells"])

# Installed in an environment of their own.
OTHER_PACKAGES = {"nbclient", "ipykernel"}
# Living repositories: all that a text may name.
HUB = set(
    """
    black-forest-labs/FLUX.1-dev black-forest-labs/FLUX.1-Kontext-dev CodeGoat24/UnifiedReward-2.0-qwen3vl-8b
    data-is-better-together/open-image-preferences-v1-binarized google-bert/bert-base-uncased
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K madebyollin/sdxl-vae-fp16-fix MizzenAI/HPSv3 nateraw/parti-prompts
    openai/clip-vit-base-patch32 openai/clip-vit-large-patch14 PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
    Qwen/Qwen2-VL-7B-Instruct Qwen/Qwen2.5-VL-7B-Instruct stabilityai/sdxl-turbo
    stabilityai/stable-diffusion-3.5-medium stabilityai/stable-diffusion-xl-base-1.0
    stable-diffusion-v1-5/stable-diffusion-v1-5 trl-lib/ddpo-aesthetic-predictor
    Wan-AI/Wan2.2-T2V-A14B-Diffusers xswu/HPSv2 yuvalkirstain/PickScore_v1 zai-org/ImageReward
    """.split()
)
PLACEHOLDERS = ("OWNER/", "path/", "where/", "me/", "own/", "my-images/")
# Files of a page's reader, of other libraries, and published prompts.
OTHER_FILES = set(
    """
    run.yaml shapes.yaml own.jsonl trainer_state.json evaluation_metadata.jsonl train_diffusion_dpo.py
    train_diffusion_dpo_sdxl.py sdxl_merge_lora.py anime.json concept-art.json paintings.json photo.json papv2.json
    hpsv2.json partiprompts.json
    """.split()
)
NAMED_FOR_THE_HUB = (
    r"(?:_name_or_path|dataset_name|--prompts|from_pretrained\(|load_dataset\()[=:\s\"']*([\w-]+/[\w.-]+)"
)


def each(pattern: str, *texts: str) -> list[str]:
    return [match for text in texts for match in re.findall(pattern, text, re.MULTILINE)]


@pytest.fixture(params=sorted(TEXTS))
def text(request) -> str:
    return TEXTS[request.param]


def test_make_has_each_target_and_part(text):
    makefile = TEXTS["Makefile"]
    targets = set(each(r"^([a-z-]+):(?!=)", makefile))
    parts = set(each(r"^PARTS := (.*)", makefile)[0].split())
    assert set(each(r"(?:`|^(?:#|- run:)? *)make ([a-z][\w-]*)(?![\w-]* [a-z])", text)) <= targets
    assert set(each(r"PART=\"?([a-z]+)", text)) <= parts


def test_each_longer_test_belongs_to_a_part():
    commands = each(r"^\t.*-m \"(?:not gpu|matrix or not matrix)\" .*", TEXTS["Makefile"])
    folders = tuple(each(r"\btests/[\w/]+", *commands))
    tests = {name: path for name, path in FILES.items() if re.match(r"tests/.*\.py$", name)}
    longer = [name for name, path in tests.items() if each(r"pytest\.mark\.matrix", path.read_text(encoding="utf-8"))]
    assert longer and [name for name in longer if not name.startswith(folders)] == []


def test_packages_and_extras_can_be_installed(text):
    pinned = set(each(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8")))
    required = {Requirement(line).name for line in PROJECT["dependencies"]}
    optional = {Requirement(line).name for lines in PROJECT["optional-dependencies"].values() for line in lines}
    known = (pinned | required | optional | OTHER_PACKAGES) - {PROJECT["name"]}  # which is on no index
    for line in each(r"pip install ([^`\n]*)", text):
        words = [word.strip("'\"") for word in line.partition("#")[0].split()]
        for word in words:
            if re.fullmatch(r"\.(\[.*\])?", word):
                assert set(each(r"\w+", word)) <= set(PROJECT["optional-dependencies"])
            elif not word.startswith("-") and word != "constraints.txt" and word != "...":
                assert re.split(r"[=<>!\[;]", word)[0] in known


def test_models_and_data_sets_of_the_hub_are_on_the_list(text):
    owners = "|".join({name.partition("/")[0] for name in HUB})
    named = each(rf"(?<![\w./-])((?:{owners})/[\w.-]*\w)", text) + each(NAMED_FOR_THE_HUB, text)
    assert {name for name in named if not name.startswith(PLACEHOLDERS)} <= HUB


def test_files_exist_or_are_written_by_a_run(text):
    sources = [path for name, path in FILES.items() if name.endswith(".py") and not name.startswith("tests/")]
    written = "".join(path.read_text(encoding="utf-8") for path in sources)
    folders = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir()) if path.is_dir()}
    blocks = "".join(each(r"(?s)^```.*?^```", text))  # a reader's own files are in the code around
    for name in each(r"`([\w./-]+\.(?:py|md|jsonl?|png|yaml|html|safetensors|ipynb))`", text):
        if name.partition("/")[0] in folders:
            assert any((folder / name).exists() for folder in (ROOT, PACKAGE, ROOT / "examples")), name
        elif "/" not in name:
            plan = name.replace(".jsonl", ".yaml")  # a study's rows may not be measured yet
            exists = any(f"/{file}".endswith((f"/{name}", f"studies/{plan}")) for file in FILES)
            assert exists or name in OTHER_FILES or name in written or name in blocks, name


@pytest.mark.parametrize("page", [name for name in TEXTS if name.endswith((".md", ".ipynb")) and "docs/" not in name])
def test_links_lead_to_files_and_headings(page):
    """The documentation's own links are checked when it is built."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", TEXTS[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            body = file.read_text(encoding="utf-8")
            slugs = {
                re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in each(r"^#+ (.*?)(?: \{.*)?$", body)
            }
            assert anchor in {re.sub(r"[\s-]+", "-", slug) for slug in slugs} | set(each(r"\{ *#([\w-]+)", body)), (
                anchor
            )


def test_no_address_is_made_up(text):
    assert each(r"(?i)(example\.(?:com|org|net)|your-(?:org|name)|TODO|FIXME|https?://(?=[\s\"')]))", text) == []
