"""The recommended scales on a model card: a marked paragraph, and marked lines in the code that generates an image."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ..utils.secrets import without_secrets
from .setup import RECOMMENDED

BEGIN = "<!-- Recommended scale: `trl-diffusion-sdpo sweep-scale` replaces what is between these two comments. -->"
END = "<!-- End of the recommended scale. -->"
MARK = "  # for the recommended scale"  # ends the lines of code that are replaced
_BLOCK = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENT = "    "
_ARGUMENT = re.compile(rf"^ *(?!reference\b)(\w+) = .*{re.escape(MARK)}$", re.MULTILINE)
UNCHANGED = (
    "The code above is left as it is, without this scale: guidance is added where one statement calls `pipeline`, a "
    "scale of a LoRA's weights where a line loads it by `pipeline.load_lora_weights(...)`. Other weights are written "
    "at a scale by `trl-diffusion-sdpo sweep-scale --bake`."
)


def with_recommended_scales(card: str, recommended: Mapping[str, Mapping[str, Any]]) -> str:
    """A card that tells what is recommended, and nothing of an earlier recommendation; all else stays as it is.

    Args:
        card (`str`): Of the trainer, or edited by a user.
        recommended (`Mapping[str, Mapping]`): See [`~trl_diffusion_sdpo.saving.setup.recommended_scales`].
    """
    if not recommended and BEGIN not in card and MARK not in card:
        return card
    newline = "\r\n" if 0 < card.count("\r\n") == card.count("\n") else "\n"
    text = _BLOCK.sub("", card.replace(newline, "\n"))
    text = _CODE.sub(lambda found: f"```python\n{_plain(found[1])}```", text)
    if recommended:
        paragraphs = [part for key, facts in sorted(recommended.items()) for part in _paragraphs(key, facts)]
        place = next((found for found in _CODE.finditer(text) if _call(found[1]) is not None), None)
        if place is None:  # a user has removed the code
            text = f"{text.rstrip()}{_block(paragraphs)}\n"
        else:
            code, facts = place[1], recommended.get(RECOMMENDED[False], {})
            if _asks_for_code(facts):
                code = _with_scale(code, facts)
                paragraphs += [UNCHANGED] if code == place[1] else []
            text = f"{text[: place.start()]}```python\n{code}```{_block(paragraphs)}{text[place.end() :]}"
    return text.replace("\n", newline)


def _block(paragraphs: Sequence[str]) -> str:
    return "\n\n".join([f"\n\n{BEGIN}", *paragraphs, END])


def _asks_for_code(facts: Mapping[str, Any]) -> bool:
    """Whether code that generates with the recommended scale is another than that of the tuned model."""
    return (facts.get("prediction") or 1.0) > 1 or (facts.get("weights") or 1.0) != 1


def _paragraphs(key: str, facts: Mapping[str, Any]) -> list[str]:
    """Why a scale is recommended, and the grids of the sweep's images."""
    sentence = " ".join(without_secrets(str(facts.get("sentence", ""))).split()).replace("<", "&lt;")
    text = f"Averaged weights: {sentence}" if key == RECOMMENDED[True] else sentence
    return [text, *(f"![Images at each scale]({path})" for path in facts.get("grids", ()))]


def _with_scale(code: str, facts: Mapping[str, Any]) -> str:
    """The code with the recommended scale: of guidance if it is above 1, else of a LoRA's weights. Code in which that
    cannot be done exactly stays as it is."""
    if "preference_guidance(" in code:  # a user's own
        return code
    weights, prediction = (facts.get(form) or 1.0 for form in ("weights", "prediction"))
    scaled = code if prediction > 1 else _scaled(code, weights)
    if prediction <= 1 and scaled == code:
        return code
    called = _with_arguments(scaled, facts.get("call", {}))
    changed = _guided(called, prediction, facts) if prediction > 1 else called
    before, after = _call(called), _call(changed)
    # The same call, and not another text in a string over several lines.
    is_same = before is not None and after is not None and ast.dump(before) == ast.dump(after)
    return changed if is_same and _plain(changed) == code else code


def _with_arguments(code: str, arguments: Mapping[str, Any]) -> str:
    """The code whose call has more arguments, each by a marked line before it; those that the call has stay."""
    for name, value in arguments.items():
        statement = _call(code)
        if statement is None:
            return code
        call = next(node for node in ast.walk(statement) if _is_call(node))
        given: list[Any] = [*call.args, *call.keywords]
        if not given or any(keyword.arg == name for keyword in call.keywords):
            continue
        last = max(given, key=lambda node: (node.end_lineno, node.end_col_offset))
        lines = code.split("\n")
        line = lines[last.end_lineno - 1].encode()  # in which ast counts
        ending = line[: last.end_col_offset], line[last.end_col_offset :]
        lines[last.end_lineno - 1] = f", {name}={name}".encode().join(ending).decode()
        lines.insert(statement.lineno - 1, f"{name} = {value!r}{MARK}")
        code = "\n".join(lines)
    return code


def _guided(code: str, scale: float, facts: Mapping[str, Any]) -> str:
    call = _call(code)
    if call is None:
        return code
    lines = code.split("\n")[:-1]
    first, last = call.lineno - 1, call.end_lineno or call.lineno
    reference = facts.get("reference")
    argument = "" if reference is None else ", reference=reference"
    argument += ", allow_distilled=True" if facts.get("distilled") else ""
    guided = [f"with preference_guidance(pipeline, scale={scale!r}{argument}):{MARK}"]
    guided += [_INDENT + line if line else line for line in lines[first:last]]
    names = ["from trl_diffusion_sdpo import preference_guidance"]
    if reference is not None:
        source, folder = json.dumps(reference["repository"]), json.dumps(reference["subfolder"])
        loaded = f"reference = AutoModel.from_pretrained({source}, subfolder={folder}).to(pipeline.device)"
        guided.insert(0, loaded + MARK)
        names += [] if re.search(r"^from diffusers import .*\bAutoModel\b", code, re.MULTILINE) else [_AUTO_MODEL]
    before = [statement for statement in ast.parse(code).body if statement.lineno <= first]
    ends = [node.end_lineno or node.lineno for node in before if isinstance(node, (ast.Import, ast.ImportFrom))]
    after = max(ends, default=0)
    marked = [name + MARK for name in names]
    return "\n".join([*lines[:after], *marked, *lines[after:first], *guided, *lines[last:]]) + "\n"


_AUTO_MODEL = "from diffusers import AutoModel"


def _scaled(code: str, scale: float) -> str:
    """With `set_adapters` after the LoRA is loaded, where diffusers loads it."""
    lines = code.split("\n")
    for i, line in enumerate(lines if scale != 1 else ()):
        if line.startswith("pipeline.load_lora_weights(") and line.endswith(")"):
            named = re.search(r"adapter_name=[\"'](.+?)[\"']", line)
            name = json.dumps(named[1] if named else "default_0")
            lines.insert(i + 1, f"pipeline.set_adapters({name}, {scale!r}){MARK}")
            break
    return "\n".join(lines)


def _plain(code: str) -> str:
    """The code without marked lines, and without the arguments that they set; what is in a marked block is no longer
    indented."""
    lines, within = [], False
    for line in code.split("\n"):
        marked = line.endswith(MARK)
        within = marked and line.startswith("with ") or (within and not marked and line[:1] in ("", " "))
        if not marked:
            lines.append(line.removeprefix(_INDENT) if within else line)
    plain = "\n".join(lines)
    for name in _ARGUMENT.findall(code):
        plain = plain.replace(f", {name}={name}", "", 1)
    return plain


def _call(code: str) -> ast.stmt | None:
    """The last statement that calls `pipeline`, if there is one and the code can be read; also in a marked block."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError):
        return None
    marked = [line.endswith(MARK) for line in code.split("\n")]
    blocks = [node.body if isinstance(node, ast.With) and marked[node.lineno - 1] else [node] for node in statements]
    calls = [
        statement
        for statement in itertools.chain.from_iterable(blocks)
        if isinstance(statement, (ast.Assign, ast.Expr)) and any(map(_is_call, ast.walk(statement)))
    ]
    return calls[-1] if calls else None


def _is_call(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipeline"
