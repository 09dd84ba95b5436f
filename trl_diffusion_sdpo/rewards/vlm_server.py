"""Score images with a vision-language model on a server with OpenAI's chat API, such as a vLLM server."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from PIL import Image

QUESTION = """Judge the image as a picture for this prompt: "{prompt}"
Give three scores from 1 (bad) to 5 (good), each on a line of its own, and nothing else:
Alignment Score (1-5): how well the image shows what the prompt says
Coherence Score (1-5): how free it is of errors in shapes, anatomy and text
Style Score (1-5): how good it looks"""
COMPARISON = """Two images were made for this prompt: "{prompt}"
Which one would a careful person prefer, for what it shows and how it looks? Answer with one line and nothing else:
Image 1 is better
or
Image 2 is better
or
Equal"""
_SCORE = re.compile(r"(Alignment|Coherence|Style) Score\s*\(1-5\)\s*:\s*\**\s*(\d+(?:\.\d+)?)", re.IGNORECASE)
_CHOICE = re.compile(r"\b(image 1|image 2|equal)\b", re.IGNORECASE)
_MAX_ANSWER = 1_000_000  # bytes
_ENOUGH_ANSWERS = 20  # `max_unreadable` is checked from this number of answers on


class VLMServerError(OSError):
    """Raised if the server cannot be reached, refuses a request, or gives too many answers that cannot be parsed."""


@dataclass(eq=False)
class VLMServerScorer:
    """Score images by asking a vision-language model on a server for three ratings from 1 to 5. The score is the mean
    rating, mapped to `[0, 1]`.

    If an answer cannot be parsed, the score is NaN. Evaluations leave out images without a score and report their
    number.

    Args:
        url (`str`): URL of the API, such as `http://127.0.0.1:8000/v1`.
        model (`str`): Name of the model on the server.
        question (`str`, *optional*): The question, in which the prompt replaces `{prompt}`. The question must make the
            model answer in lines like `Alignment Score (1-5): 4`.
        batch_size (`int`, *optional*, defaults to `8`): Number of parallel requests.
        timeout (`float`, *optional*, defaults to `120.0`): Time limit of a request in seconds.
        max_unreadable (`float`, *optional*, defaults to `0.05`): Largest allowed share of answers that cannot be
            parsed. Nothing is checked before the 20th answer.
        max_tokens (`int`, *optional*, defaults to `256`): Largest length of an answer in tokens.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): Environment variable that may contain an
            API key. If the variable is set, requests contain the key.

    Raises:
        `VLMServerError`: When the scorer is called, if the server cannot be reached, refuses a request, or gives too
            many answers that cannot be parsed.

    Example:

    ```python
    from trl_diffusion_sdpo.rewards import load_scorer

    scorer = load_scorer("vlm_server", url="http://127.0.0.1:8000/v1", model="CodeGoat24/UnifiedReward-2.0-qwen3vl-8b")
    ```
    """

    url: str
    model: str
    _: KW_ONLY
    question: str = QUESTION
    batch_size: int = 8
    timeout: float = 120.0
    max_unreadable: float = 0.05
    max_tokens: int = 256
    api_key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"`url` must begin with `http://` or `https://`, got {self.url!r}. Correct the address.")
        if "{prompt}" not in self.question:
            raise ValueError(f"`question` must contain `{{prompt}}`, got {self.question!r}.")
        self.name = f"vlm_server({self.model.split('/')[-1]})"
        self.url = f"{self.url.rstrip('/')}/chat/completions"
        self.answered = 0
        self.unreadable = 0

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        questions = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        requests = [([image], question) for image, question in zip(images, questions, strict=True)]
        scores = [read_score(answer) for answer in self._ask(requests)]
        self._count(sum(score is None for score in scores), len(scores))
        return torch.tensor([math.nan if score is None else score for score in scores])

    def compare(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> torch.Tensor:
        """Return the model's preferences for N pairs of images, `(N,)`: 1 if the model prefers the first image of a
        pair, -1 if it prefers the second image, and 0 for a tie.

        The model sees each pair in both orders. If the two answers on a pair contradict each other, the pair is a tie.
        If one of the answers cannot be parsed, the result is NaN.
        """
        questions = [COMPARISON.replace("{prompt}", prompt) for prompt in prompts]
        orders = [list(pair) for pair in zip(first, second, strict=True)]
        reversed_orders = [pair[::-1] for pair in orders]
        answers = self._ask([*zip(orders, questions, strict=True), *zip(reversed_orders, questions, strict=True)])
        choices = [read_choice(answer) for answer in answers]
        self._count(sum(choice is None for choice in choices), len(choices))
        results = []
        for choice, swapped in zip(choices[: len(orders)], choices[len(orders) :], strict=True):
            if choice is None or swapped is None:
                results.append(math.nan)
            else:
                results.append(float(choice) if choice == -swapped else 0.0)
        return torch.tensor(results)

    def _ask(self, requests: list[tuple[list[Image.Image], str]]) -> list[str]:
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(lambda request: self._answer(*request), requests))

    def _answer(self, images: list[Image.Image], question: str) -> str:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
        ]
        content.append({"type": "text", "text": question})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                answer = response.read(_MAX_ANSWER)
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

    def _count(self, unreadable: int, answered: int) -> None:
        self.answered += answered
        self.unreadable += unreadable
        if self.answered >= _ENOUGH_ANSWERS and self.unreadable > self.max_unreadable * self.answered:
            raise VLMServerError(
                f"The share of answers that cannot be parsed must be at most `max_unreadable={self.max_unreadable}`, "
                f"but {self.unreadable} of {self.answered} answers of {self.model} cannot be parsed. Use another "
                "model, or change `question`."
            )


class VLMServerJudge(VLMServerScorer):
    """Judge pairs of images by asking a vision-language model on a server which image is better, in both orders.

    A judge cannot score a single image. In an evaluation, the judge compares each image of a model with the base
    model's image of the same prompt and noise. The score is 1 if the judge prefers the model's image, -1 if it prefers
    the base model's image, and 0 for a tie. Arguments are those of [`VLMServerScorer`] without `question`.
    """

    def __init__(self, url: str, model: str, **settings: Any):
        if "question" in settings:
            raise ValueError(
                "The question of the scorer `vlm_judge` cannot be changed, got the setting `question`. Leave it out."
            )
        super().__init__(url, model, **settings)
        self.name = f"vlm_judge({model.split('/')[-1]})"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        raise ValueError(
            f"`{self.name}` compares two images and cannot score a single image. Use this judge in `evaluate` or in "
            "`pairs generate`."
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, because a redirected request would send the API key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def read_score(answer: str) -> float | None:
    """Return the mean of the ratings in an answer, mapped from 1-5 to 0-1, or `None` if the answer has no rating."""
    scores = {axis.lower(): min(max(float(score), 1.0), 5.0) for axis, score in _SCORE.findall(answer)}
    if not scores:
        return None
    return (sum(scores.values()) / len(scores) - 1) / 4


def read_choice(answer: str) -> int | None:
    """Return 1 if an answer prefers the first image, -1 if it prefers the second image, and 0 if it calls them equal.
    Return `None` if the answer names none of the three choices or several."""
    named = {choice.lower() for choice in _CHOICE.findall(answer)}
    if len(named) != 1:
        return None
    return {"image 1": 1, "image 2": -1, "equal": 0}[named.pop()]


def data_url(image: Image.Image) -> str:
    """Return an image as a data URL in PNG format."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
