"""The scorer behind a URL, against a server on this machine."""

import base64
import contextlib
import io
import json
import math
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from trl_diffusion_sdpo.tools.rewards.vlm_server import VLMServerError, VLMServerScorer, read_score

IMAGES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 20, 30)]
PROMPTS = ["one", "two", "three"]
GREAT = "alignment score (1-5): 9\n**Coherence Score (1-5):** 5\n- Style Score (1-5) : **10**"
GOOD = "Alignment Score (1-5): 4\nCoherence Score (1-5): **3**\nStyle Score (1-5): 5"


@pytest.fixture
def server():
    """A chat server whose `answer` a test sets: a function of the request's body that returns text, or raw bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, dict(self.headers), body))
            answer = server.answer(body)
            if isinstance(answer, int):
                self.send_response(answer)
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                return
            if isinstance(answer, str):
                answer = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            if callable(answer):
                answer(self.wfile)
                return
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # the client waits no longer
                self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.answer = lambda body: GOOD
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def reds(body) -> list[int]:
    """The red values of the images of a request."""
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return [image.getpixel((0, 0))[0] for image in images]


def test_the_mean_of_the_scores_is_mapped_to_0_and_1(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    server.answer = lambda body: GOOD if reds(body) == [10] else GREAT
    scores = VLMServerScorer(server.url, "org/model")(IMAGES, PROMPTS)
    assert scores.tolist() == [0.75, 1.0, 1.0]  # (4 + 3 + 5) / 3 = 4 -> 3 / 4; 9 is cut to 5
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer a-secret-key"
    assert body["model"] == "org/model" and body["temperature"] == 0


def test_without_a_key_no_other_token_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "the-token-of-the-hub")
    VLMServerScorer(server.url, "model")(IMAGES[:1], PROMPTS[:1])
    _, headers, body = server.requests[0]
    assert "the-token-of-the-hub" not in f"{headers} {body}"


def test_an_answer_is_read_to_a_limit(server):
    server.answer = lambda body: b" " * 50_000_000
    with pytest.raises(VLMServerError, match="format"):
        tracemalloc.start()
        VLMServerScorer(server.url, "model")(IMAGES[:1], PROMPTS[:1])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 80_000_000  # the server's answer itself, and little more


def test_unreadable_answers_are_missing_and_too_many_are_an_error(server):
    server.answer = lambda body: "I like it" if reds(body) == [20] else GOOD
    scorer = VLMServerScorer(server.url, "model", max_unreadable=0.2)
    assert [math.isnan(score) for score in scorer(IMAGES, PROMPTS).tolist()] == [False, True, False]
    with pytest.raises(VLMServerError, match="max_unreadable"):
        scorer(IMAGES * 6, PROMPTS * 6)


@pytest.mark.parametrize(
    "answer",
    [
        "Alignment Score (1-5): 5",
        "Alignment Score (1-5): 5\nStyle Score (1-5): 5",
        "Alignment Score (1-5): how well\nCoherence Score (1-5): 1\nStyle Score (1-5): 2",
    ],
)
def test_an_answer_without_all_three_ratings_is_unreadable(answer):
    assert read_score(answer) is None


@pytest.mark.parametrize("padding", [" ", "*", "\n", "Style Score (1-5): ", "Style Score (1-5)", "9", "** "])
def test_a_million_characters_are_read_at_once(padding):
    started = time.monotonic()
    read_score(f"Style Score (1-5){padding * 1_000_000}")
    assert time.monotonic() - started < 2


def test_pairs_are_compared_in_both_orders(server):
    def answer(body):
        first, second = reds(body)
        if {first, second} == {10, 20}:
            return "Image 1 is better" if first > second else "Image 2 is better"  # the redder one, in both orders
        return "Image 1 is better"  # whichever comes first: a contradiction

    server.answer = answer
    scorer = VLMServerScorer(server.url, "model")
    assert scorer.compare([IMAGES[1], IMAGES[0], IMAGES[0]], [IMAGES[0], IMAGES[1], IMAGES[2]], PROMPTS).tolist() == [
        1.0,
        -1.0,
        0.0,
    ]
    server.answer = lambda body: "Both are fine"
    assert all(math.isnan(result) for result in scorer.compare(IMAGES[:1], IMAGES[1:2], PROMPTS[:1]).tolist())


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b"<html>", "format"),
        (b"{}", "format"),
        (b"[" * 100_000, "format"),  # deeper than Python's recursion
        (500, "500"),
        (302, "302"),
        (lambda file: file.write(b"220 mail\r\n"), "220 mail"),
        (lambda file: file.write(b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{"), "answer"),
        (lambda file: file.write(b"HTTP/1.0 401 a-secret-key is wrong\r\n\r\nNo: a-secret-key"), "401"),
        (b"You sent a-secret-key", "You sent"),
    ],
)
def test_a_server_that_answers_garbage_or_redirects_is_an_error_without_the_key(answer, match, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    server.answer = lambda body: answer
    with pytest.raises(VLMServerError, match=match) as error:
        VLMServerScorer(server.url, "model")(IMAGES[:1], PROMPTS[:1])
    assert "a-secret-key" not in str(error.value)


def test_a_server_that_does_not_answer_is_an_error(server):
    server.answer = lambda body: time.sleep(0.6) or GOOD
    with pytest.raises(VLMServerError, match="timeout"):
        VLMServerScorer(server.url, "model", timeout=0.2)(IMAGES[:1], PROMPTS[:1])
    with pytest.raises(VLMServerError, match="does not answer"):
        VLMServerScorer("http://127.0.0.1:9/v1", "model")(IMAGES[:1], PROMPTS[:1])


def test_the_time_limit_is_of_the_whole_request(server):
    """A byte every 20 ms never exceeds the time of one read."""

    def drip(file):
        with contextlib.suppress(OSError):
            file.write(b"HTTP/1.0 200 OK\r\nContent-Length: 500\r\n\r\n")
            for _ in range(150):
                file.write(b" ")
                time.sleep(0.02)

    server.answer = lambda body: drip
    started = time.monotonic()
    with pytest.raises(VLMServerError, match=r"0\.3"):
        VLMServerScorer(server.url, "model", timeout=0.3)(IMAGES[:1], PROMPTS[:1])
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "http://host:port/v1", "http://a host/v1", "http://", "http://host:99999/v1", "host:8000"]
)
def test_an_address_that_cannot_be_one_is_refused(url):
    with pytest.raises(ValueError, match="`url`"):
        VLMServerScorer(url, "model")


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="`url`") as error:
        VLMServerScorer("http://user:hunter2@127.0.0.1:9/v1", "model")
    assert "hunter2" not in str(error.value)
