"""The recommended scales on a model card: a marked paragraph, and marked lines in the code that generates an image."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from ..masking import without_secrets
from .setup import RECOMMENDED

BEGIN = "<!-- Recommended scale: `trl-diffusion-sdpo sweep-scale` replaces what is between these two comments. -->"
END = "<!-- End of the recommended scale. -->"
MARK = "  # for the recommended scale"  # ends the lines of code that are replaced
_BLOCK = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENT = "    "


def with_recommended_scales(card: str, recommended: Mapping[str, Mapping[str, Any]]) -> str:
    """A card that tells what is recommended, and nothing of an earlier recommendation; all else stays as it is.

    Args:
        card (`str`): Of the trainer, or edited by a user.
        recommended (`Mapping[str, Mapping]`): See [`~trl_diffusion_sdpo.artifacts.setup.recommended_scales`].
    """
    newline = "\r\n" if "\r\n" in card else "\n"
    text = _BLOCK.sub("", card.replace("\r\n", "\n"))
    text = _CODE.sub(lambda found: f"```python\n{_plain(found[1])}```", text)
    if recommended:
        paragraphs = [part for key, facts in sorted(recommended.items()) for part in _paragraphs(key, facts)]
        block = "\n\n".join([f"\n\n{BEGIN}", *paragraphs, END])
        place = next((found for found in _CODE.finditer(text) if _call(found[1]) is not None), None)
        if place is None:  # a user has removed the code
            text = f"{text.rstrip()}{block}\n"
        else:
            code = _with_scale(place[1], recommended.get(RECOMMENDED[False], {}))
            text = f"{text[: place.start()]}```python\n{code}```{block}{text[place.end() :]}"
    return text.replace("\n", newline)


def _paragraphs(key: str, facts: Mapping[str, Any]) -> list[str]:
    """Why a scale is recommended, and the grids of the sweep's images."""
    sentence = " ".join(without_secrets(str(facts.get("sentence", ""))).split()).replace("<", "&lt;")
    text = f"Averaged weights: {sentence}" if key == RECOMMENDED[True] else sentence
    return [text, *(f"![Images at each scale]({path})" for path in facts.get("grids", ()))]


def _with_scale(code: str, facts: Mapping[str, Any]) -> str:
    """The code with the recommended scale: of guidance if it is above 1, else of a LoRA's weights."""
    call = _call(code)
    if call is None or "preference_guidance(" in code:  # a user's own
        return code
    weights, prediction = (facts.get(form) or 1.0 for form in ("weights", "prediction"))
    if prediction > 1:
        return _guided(code, call, prediction, facts.get("reference"))
    if weights != 1:
        return _scaled(code, weights)
    return code


def _guided(code: str, call: ast.stmt, scale: float, reference: Mapping[str, str] | None) -> str:
    lines = code.splitlines()
    first, last = call.lineno - 1, call.end_lineno or call.lineno
    argument = "" if reference is None else ", reference=reference"
    guided = [f"with preference_guidance(pipeline, scale={scale!r}{argument}):{MARK}"]
    guided += [_INDENT + line if line else line for line in lines[first:last]]
    names = ["from trl_diffusion_sdpo import preference_guidance"]
    if reference is not None:
        source, folder = json.dumps(reference["repository"]), json.dumps(reference["subfolder"])
        loaded = f"reference = AutoModel.from_pretrained({source}, subfolder={folder}).to(pipeline.device)"
        guided.insert(0, loaded + MARK)
        names += [] if re.search(r"^from diffusers import .*\bAutoModel\b", code, re.MULTILINE) else [_AUTO_MODEL]
    imports = [i for i, line in enumerate(lines[:first]) if line.startswith(("from ", "import "))]
    after = imports[-1] + 1 if imports else 0
    marked = [name + MARK for name in names]
    return "\n".join([*lines[:after], *marked, *lines[after:first], *guided, *lines[last:]]) + "\n"


_AUTO_MODEL = "from diffusers import AutoModel"


def _scaled(code: str, scale: float) -> str:
    """With `set_adapters` after the LoRA is loaded, where diffusers loads it."""
    lines = code.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("pipeline.load_lora_weights(") and line.endswith(")"):
            named = re.search(r"adapter_name=[\"'](.+?)[\"']", line)
            name = json.dumps(named[1] if named else "default_0")
            lines.insert(i + 1, f"pipeline.set_adapters({name}, {scale!r}){MARK}")
            break
    return "\n".join(lines) + "\n"


def _plain(code: str) -> str:
    """The code without marked lines; what is in a marked block is no longer indented."""
    lines, within = [], False
    for line in code.splitlines():
        marked = line.endswith(MARK)
        within = marked and line.startswith("with ") or (within and not marked and line[:1] in ("", " "))
        if not marked:
            lines.append(line.removeprefix(_INDENT) if within else line)
    return "".join(f"{line}\n" for line in lines)


def _call(code: str) -> ast.stmt | None:
    """The last statement that calls `pipeline`, if there is one and the code can be read."""
    try:
        statements = ast.parse(code).body
    except SyntaxError:
        return None
    calls = [
        statement
        for statement in statements
        if isinstance(statement, (ast.Assign, ast.Expr))
        and any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipeline"
            for node in ast.walk(statement)
        )
    ]
    return calls[-1] if calls else None
