"""Score images with a vision-language model on a server with OpenAI's chat API, such as a vLLM server."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

QUESTION = """Judge the image as a picture for this prompt: "{prompt}"
Give three scores from 1 (bad) to 5 (good), each on a line of its own, and nothing else:
Alignment Score (1-5): how well the image shows what the prompt says
Coherence Score (1-5): how free it is of errors in shapes, anatomy and text
Style Score (1-5): how good it looks"""
_SCORE = re.compile(r"(Alignment|Coherence|Style) Score\s*\(1-5\)\s*:\s*\**\s*(\d+(?:\.\d+)?)", re.IGNORECASE)


class VLMServerError(OSError):
    """Raised if the server cannot be reached, refuses a request, or does not answer in the format of OpenAI's API."""


class VLMServerScorer:
    """Score images by asking a vision-language model on a server for three ratings from 1 to 5. The score is the mean
    rating, mapped to `[0, 1]`.

    If the environment variable `OPENAI_API_KEY` is set, requests contain this key. If an answer cannot be parsed, the
    score is NaN. Evaluations leave out images without a score and report their number.

    Args:
        url (`str`): URL of the API, such as `http://127.0.0.1:8000/v1`.
        model (`str`): Name of the model on the server.
        question (`str`, *optional*): The question, in which the prompt replaces `{prompt}`. The question must make the
            model answer in lines like `Alignment Score (1-5): 4`.
        batch_size (`int`, *optional*, defaults to `8`): Number of parallel requests.
        timeout (`float`, *optional*, defaults to `120.0`): Time limit of a request in seconds.

    Raises:
        `VLMServerError`: When the scorer is called, if the server cannot be reached or refuses a request.

    Example:

    ```python
    from trl_diffusion_sdpo.rewards import load_scorer

    scorer = load_scorer("vlm_server", url="http://127.0.0.1:8000/v1", model="CodeGoat24/UnifiedReward-2.0-qwen3vl-8b")
    ```
    """

    def __init__(self, url: str, model: str, *, question: str = QUESTION, batch_size: int = 8, timeout: float = 120.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must begin with `http://` or `https://`, got {url!r}. Correct the address.")
        if "{prompt}" not in question:
            raise ValueError(f"`question` must contain `{{prompt}}`, got {question!r}.")
        self.name = f"vlm_server({model.split('/')[-1]})"
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.model = model
        self.question = question
        self.batch_size = batch_size
        self.timeout = timeout

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"Pass one prompt for each image, got {len(images)} images and {len(prompts)} prompts.")
        with ThreadPoolExecutor(self.batch_size) as pool:
            return torch.tensor([read_score(answer) for answer in pool.map(self._ask, images, prompts)])

    def _ask(self, image: Image.Image, prompt: str) -> str:
        question = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, question]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 256}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode(errors="replace")
            raise VLMServerError(
                f"The server {self.url} refused the request with status {error.code}: {detail}"
            ) from error
        except OSError as error:  # no connection, timeout
            raise VLMServerError(
                f"The server {self.url} does not answer: {error}. Start the server, or raise `timeout`."
            ) from error
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as error:
            raise VLMServerError(
                f"The server {self.url} must answer in the format of OpenAI's chat API, got {answer[:200]!r}. Check "
                "the address."
            ) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, because a redirected request would send the API key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def read_score(answer: str) -> float:
    """Return the mean of the ratings in an answer, mapped from 1-5 to 0-1, or NaN if the answer has no rating."""
    scores = {axis.lower(): min(max(float(score), 1.0), 5.0) for axis, score in _SCORE.findall(answer)}
    return (sum(scores.values()) / len(scores) - 1) / 4 if scores else math.nan


def data_url(image: Image.Image) -> str:
    """Return an image as a data URL in PNG format."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
