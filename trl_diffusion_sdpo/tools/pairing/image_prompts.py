"""Read prompts and ratings from the metadata of generated images. It may be damaged or malicious, so its size is
limited and errors in it are ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

MAX_METADATA = 4 * 2**20  # characters; a ComfyUI graph has about 100,000
MAX_NODES = 1000  # most nodes of a ComfyUI graph to visit
# Inputs of a ComfyUI node that can hold the prompt (`_TEXTS`) or be linked to the node that does (`_LINKS`), in the
# order in which they are read.
_TEXTS = ("text", "text_g", "t5xxl", "clip_l", "prompt", "positive_prompt", "string", "value")
_LINKS = ("positive", "guider", "conditioning", "conditioning_1", *_TEXTS)
# Makes A1111 load a LoRA or a hypernetwork. It does not describe the image, so it is removed from prompts.
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_RATING = re.compile(r"""(?:xmp:Rating\s*=\s*["']|<xmp:Rating>\s*)(-1|[1-5])\b""")
_WINDOWS_RATING = 0x4746  # EXIF tag


def prompt_in_metadata(image: Image.Image) -> str:
    """Return the prompt in an image's metadata, or an empty string, without decoding pixels."""
    texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
    exif = image.getexif()
    comment = _comment(exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment))
    for text in (texts.get("parameters"), texts.get("sui_image_params"), comment):
        if text and len(text) <= MAX_METADATA and (prompt := _prompt_of_parameters(text)):
            return prompt
    graphs = [value for value in exif.values() if isinstance(value, str) and value[:7].lower() == "prompt:"]
    for text in (texts.get("prompt"), *(graph[7:] for graph in graphs)):
        if text and len(text) <= MAX_METADATA and (prompt := _prompt_of_graph(text)):
            return prompt
    return ""


def rating_in_metadata(image: Image.Image) -> float | None:
    """Return an image's star rating in XMP or EXIF: 1 to 5, -1 if it is marked as rejected, or `None`."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        packet = image.info.get(key, "")
        text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
        if match := _RATING.search(text[:MAX_METADATA]):
            return float(match[1])
    stars = image.getexif().get(_WINDOWS_RATING)
    return float(stars) if isinstance(stars, int) and 1 <= stars <= 5 else None


def _prompt_of_parameters(text: str) -> str:
    """Return the prompt in the text of A1111 and Forge, or in the JSON of SwarmUI."""
    if text.lstrip().startswith("{"):
        content = _json(text)
        inner = content.get("sui_image_params", content)
        prompt = inner.get("prompt") if isinstance(inner, Mapping) else None
        return " ".join(prompt.split()) if isinstance(prompt, str) else ""
    prompt = re.split(r"(?:^|\n)(?:Negative prompt:|Steps: \d)", text, maxsplit=1)[0]
    return " ".join(_NETWORK.sub("", prompt).split())


def _prompt_of_graph(text: str) -> str:
    """Return the prompt in a ComfyUI graph, or the plain prompt that `evaluate` writes into images."""
    if not text.lstrip().startswith("{"):
        return " ".join(text.split())
    graph = {key: node for key, node in _json(text).items() if isinstance(node, Mapping)}
    starts = [key for key, node in graph.items() if _inputs(node).keys() & {"positive", "guider"}]
    return next(filter(None, (_text_before(graph, start) for start in starts)), "")


def _text_before(graph: Mapping[str, Any], start: str) -> str:
    """Follow the links of a graph from a sampler node back to its positive prompt, and return it."""
    waiting = [start]
    visited = set[str]()
    while waiting and len(visited) < MAX_NODES:
        key = waiting.pop(0)
        if key in visited or key not in graph:
            continue
        visited.add(key)
        inputs = _inputs(graph[key])
        for name in _TEXTS:
            if key != start and isinstance(inputs.get(name), str) and inputs[name].strip():
                return " ".join(inputs[name].split())
        # A link is a list: a node's name and the number of one of its outputs.
        waiting += [str(inputs[name][0]) for name in _LINKS if isinstance(inputs.get(name), list) and inputs[name]]
    return ""


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, Mapping) else {}


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _comment(value: Any) -> str:
    """Return the text of an EXIF comment, whose first eight bytes name its encoding."""
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else ""
    head = value[:8]
    body = value[8:]
    if not head.startswith(b"UNICODE"):
        return (body if head.startswith(b"ASCII") else value).decode("utf-8", "ignore").strip("\0 ")
    # Programs write UTF-16 in different byte orders. Most characters have a zero high byte, which shows the order.
    is_big = body[0:200:2].count(0) >= body[1:200:2].count(0)
    return body.decode("utf-16-be" if is_big else "utf-16-le", "ignore").strip("\0 ")
