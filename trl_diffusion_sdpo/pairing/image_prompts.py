"""Prompts and ratings in the metadata of generated images. Metadata may be damaged or lie: nothing in it is trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

MAX_METADATA = 4 * 2**20  # characters; a graph of ComfyUI has some 100,000
MAX_NODES = 1000  # of a graph that are visited
# Inputs of a ComfyUI node that hold its text, and inputs that link to the node with the text, in order.
_TEXTS = ("text", "text_g", "t5xxl", "clip_l", "prompt", "positive_prompt", "string", "value")
_LINKS = ("positive", "guider", "conditioning", "conditioning_1", *_TEXTS)
_NETWORK = re.compile(
    r"<(?:lora|lyco|hypernet):[^<>]*>"
)  # A1111 loads a network by this text; it is no part of the prompt
_RATING = re.compile(r"""(?:xmp:Rating\s*=\s*["']|<xmp:Rating>\s*)(-1|[1-5])\b""")
_WINDOWS_RATING = 0x4746  # EXIF tag


def prompt_in_metadata(image: Image.Image) -> tuple[str, str]:
    """Return the prompt that an image was generated from, and the name of the format that it was in.

    Args:
        image (`PIL.Image.Image`): An opened image. Its pixels are not decoded.

    Returns:
        `tuple[str, str]`: Two empty strings if there is no prompt.
    """
    texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
    exif = image.getexif()
    comment = _comment(exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment))
    for text in (texts.get("parameters"), texts.get("sui_image_params"), comment):
        if text and len(text) <= MAX_METADATA and (prompt := _of_parameters(text))[0]:
            return prompt
    graphs = [value for value in exif.values() if isinstance(value, str) and value[:7].lower() == "prompt:"]
    for text in (texts.get("prompt"), *(graph[7:] for graph in graphs)):
        if text and len(text) <= MAX_METADATA and (prompt := _of_graph(text))[0]:
            return prompt
    return "", ""


def rating_in_metadata(image: Image.Image) -> float | None:
    """Return the star rating of an image, from XMP or EXIF: 1 to 5, or -1 for a rejected image. 0 means no rating."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        packet = image.info.get(key, "")
        text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
        if match := _RATING.search(text[:MAX_METADATA]):
            return float(match[1])
    stars = image.getexif().get(_WINDOWS_RATING)
    return float(stars) if isinstance(stars, int) and 1 <= stars <= 5 else None


def _of_parameters(text: str) -> tuple[str, str]:
    """Read the text of A1111 and Forge, or the JSON of SwarmUI."""
    if text.lstrip().startswith("{"):
        content = _json(text)
        inner = content.get("sui_image_params", content)
        prompt = inner.get("prompt") if isinstance(inner, Mapping) else None
        return (" ".join(prompt.split()), "SwarmUI") if isinstance(prompt, str) else ("", "")
    prompt = re.split(r"(?:^|\n)(?:Negative prompt:|Steps: \d)", text, maxsplit=1)[0]
    return " ".join(_NETWORK.sub("", prompt).split()), "A1111 or Forge"


def _of_graph(text: str) -> tuple[str, str]:
    """Read the graph of ComfyUI, or a plain prompt as `evaluate` writes it."""
    if not text.lstrip().startswith("{"):
        return " ".join(text.split()), "text in the image"
    graph = {key: node for key, node in _json(text).items() if isinstance(node, Mapping)}
    starts = [key for key, node in graph.items() if _inputs(node).keys() & {"positive", "guider"}]
    for start in starts:
        if prompt := _text_before(graph, start):
            return prompt, "ComfyUI"
    return "", ""


def _text_before(graph: Mapping[str, Any], start: str) -> str:
    """Follow the links of a graph from a sampler back to the text of its positive prompt."""
    waiting, visited = [start], set[str]()
    while waiting and len(visited) < MAX_NODES:
        key = waiting.pop(0)
        if key in visited or key not in graph:
            continue
        visited.add(key)
        inputs = _inputs(graph[key])
        for name in _TEXTS:
            if key != start and isinstance(inputs.get(name), str) and inputs[name].strip():
                return " ".join(inputs[name].split())
        # A link is a list of a node's name and the number of its output.
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
    """Return an EXIF comment. Its first eight bytes name its encoding."""
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else ""
    head, body = value[:8], value[8:]
    if not head.startswith(b"UNICODE"):
        return (body if head.startswith(b"ASCII") else value).decode("utf-8", "ignore").strip("\0 ")
    # Programs disagree on the order of bytes. Most text has zeros in the high bytes.
    is_big = body[0:200:2].count(0) >= body[1:200:2].count(0)
    return body.decode("utf-16-be" if is_big else "utf-16-le", "ignore").strip("\0 ")
