"""Score images with a vision-language model on a server with OpenAI's chat API, such as a vLLM server."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from PIL import Image

from ...utils.errors import UserError
from ...utils.score_scale import ScoreScale
from ...utils.secrets import without_secrets
from .scorer import KnownScorer

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
AXES = ("alignment", "coherence", "style")
# Markdown such as `**Style Score (1-5):** 4` may stand around the colon. Neighbouring parts of the pattern never match
# the same characters, so the search is linear.
_SCORE = re.compile(rf"({'|'.join(AXES)}) Score[\s*]*\(1-5\)[\s*]*:[\s*]*(\d+(?:\.\d+)?)", re.IGNORECASE)
_CHOICE = re.compile(r"\b(image 1|image 2|equal)\b", re.IGNORECASE)
_MAX_ANSWER = 1_000_000  # bytes
_READ_CHARACTERS = 20_000  # the rest of an answer is not read
_SHOWN = 300  # bytes of an answer in an error message
_ENOUGH_ANSWERS = 20  # `max_unreadable` is checked from this number on


class VLMServerError(OSError, UserError):
    """Raised if the server cannot be reached, refuses a request, or gives too many answers that cannot be parsed."""


@dataclass(eq=False)
class VLMServerScorer(KnownScorer):
    """Score images by a vision-language model on a server: the mean of three ratings from 1 to 5, mapped to `[0, 1]`.

    An answer that lacks one of the three gives NaN. Evaluations leave out images without a score and report their
    number.

    Args:
        url (`str`): URL of the API, such as `http://127.0.0.1:8000/v1`, without a user, a password or a query.
        model (`str`): Name of the model on the server.
        question (`str`, *optional*): The question, with `{prompt}` for the prompt. It must make the model rate
            `Alignment`, `Coherence` and `Style`, in lines like `Alignment Score (1-5): 4`.
        batch_size (`int`, *optional*, defaults to `8`): Number of parallel requests.
        timeout (`float`, *optional*, defaults to `120.0`): Time limit of a whole request in seconds.
        max_unreadable (`float`, *optional*, defaults to `0.05`): Largest allowed share of answers that cannot be
            parsed, from the 20th answer on.
        max_tokens (`int`, *optional*, defaults to `256`): Largest length of an answer in tokens.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): Environment variable with an API key. If
            it is set, requests contain the key.

    Raises:
        `VLMServerError`: When the scorer is called, if the server cannot be reached, refuses a request, or gives too
            many answers that cannot be parsed.

    Example:

    ```python
    from trl_diffusion_sdpo.tools.rewards import load_scorer

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
    score_scale = ScoreScale(low=0.0, high=1.0, lowest=0.0, highest=1.0)

    def __post_init__(self) -> None:
        _check_url(self.url)
        if "{prompt}" not in self.question:
            raise UserError(f"`question` must contain `{{prompt}}`, got {self.question!r}.")
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
        """Return the model's preferences for N pairs of images, `(N,)`: 1 for the first image of a pair, -1 for the
        second, and 0 for a tie.

        The model sees each pair in both orders. Answers that contradict each other make a tie; one that cannot be
        parsed gives NaN.
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
        """Return the answer to a question about images.

        Raises:
            VLMServerError: If there is no answer in time, or it does not have the format of the API.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": png_url(image)}} for image in images
        ]
        content.append({"type": "text", "text": question})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        key = os.environ.get(self.api_key_variable, "").strip()
        try:
            status, answer = _within(self.timeout, lambda: _post(self.url, body, key, self.timeout))
        except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, timeout, no HTTP, a bad key
            reason = str(error) or type(error).__name__
            raise self._refusal(
                f"does not answer: {reason}. Check the address, start the server, or raise `timeout`.", key
            ) from None
        text = answer.decode(errors="replace")
        if status != 200:
            raise self._refusal(f"refused the request with status {status}: {text[:_SHOWN]}", key)
        try:
            return str(json.loads(text)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._refusal(
                f"must answer in the format of OpenAI's chat API, got {text[:_SHOWN]!r}. Check the address.", key
            ) from None

    def _refusal(self, what: str, key: str) -> VLMServerError:
        hidden = without_secrets(what.replace(key, "...") if key else what)  # servers may repeat the key
        return VLMServerError(f"The server {self.url} {hidden}")

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
    """Judge pairs of images by asking a vision-language model on a server which is better, in both orders.

    A judge cannot score a single image. An evaluation lets it compare each image of a model with the base model's of
    the same prompt and noise: 1 if it prefers the model's image, -1 if the base model's, and 0 for a tie. Arguments are
    those of [`VLMServerScorer`] without `question`.
    """

    def __init__(self, url: str, model: str, **settings: Any):
        if "question" in settings:
            raise UserError(
                "The question of the scorer `vlm_judge` cannot be changed, got the setting `question`. Leave it out."
            )
        super().__init__(url, model, **settings)
        self.name = f"vlm_judge({model.split('/')[-1]})"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        raise UserError(
            f"`{self.name}` compares two images and cannot score a single image. Use this judge in `evaluate` or in "
            "`pairs generate`."
        )


def _check_url(url: str) -> None:
    """Raise `ValueError` if a URL is not a plain address of a server. The message hides passwords."""
    try:
        parts = urllib.parse.urlsplit(url)
        extra = parts.username or parts.password or parts.query or parts.fragment or re.search(r"\s", url)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and not extra and parts.port != 0
    except ValueError:  # a wrong port or host
        is_plain = False
    if not is_plain:
        raise UserError(
            "`url` must be `http://HOST[:PORT][/PATH]`, or the same with `https`, without blanks, user, password and "
            f"query, got {without_secrets(url)!r}. Correct the address, and put a key into the environment variable "
            "that `api_key_variable` names."
        )


def read_score(answer: str) -> float | None:
    """Return the mean of an answer's ratings of all `AXES`, mapped from 1-5 to 0-1, or `None` if one is missing."""
    found = _SCORE.findall(answer[:_READ_CHARACTERS])
    scores = {axis.lower(): min(max(float(score), 1.0), 5.0) for axis, score in found}
    if len(scores) < len(AXES):
        return None
    return (sum(scores.values()) / len(scores) - 1) / 4


def read_choice(answer: str) -> int | None:
    """Return 1 if an answer prefers the first image, -1 if the second, 0 if it calls them equal, and `None` if it names
    none of the three choices or several."""
    named = {choice.lower() for choice in _CHOICE.findall(answer[:_READ_CHARACTERS])}
    if len(named) != 1:
        return None
    return {"image 1": 1, "image 2": -1, "equal": 0}[named.pop()]


def png_url(image: Image.Image) -> str:
    """Return an image as a data URL in PNG format."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- One request ----------------------------------------------------------------------------------------------------
#
# `huggingface_hub.InferenceClient` speaks this API too. But without a key it sends the Hub's token to any server, and
# it follows redirects, reads an answer of any length, limits each read instead of the request, and refuses a server on
# this machine under `HF_HUB_OFFLINE`.


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, which would send the API key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _post(url: str, body: Mapping[str, Any], key: str, timeout: float) -> tuple[int, bytes]:
    """Send a request and return the status and the beginning of the answer."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            return response.status, response.read(_MAX_ANSWER)
    except urllib.error.HTTPError as error:
        return error.code, error.read(_SHOWN)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Return the result of `work`, or raise `TimeoutError` after `seconds`, with `work` going on in a thread that does
    not keep the process alive.

    A socket's timeout limits each read, so a server that sends one byte at a time would never reach it.
    """
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:  # raised again below, in the caller's thread
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no whole answer within {seconds:g} seconds") from None
