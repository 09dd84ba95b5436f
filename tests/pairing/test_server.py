"""The server answers its own page and nobody else."""

import json
import socket

import pytest

from trl_diffusion_sdpo.pairing.server import PickServer


def test_without_the_token_there_is_nothing(client, folder):
    pick = {**client.ask("state")[1]["pair"], "verdict": "first"}
    for token in ("", "x", client.server.token[:-1], client.server.token + "x", "%C3%BC"):
        status, _, content = client.request(token=token)
        assert status == 403 and client.server.token.encode() not in content
        assert client.request("POST", "pick", pick, token=token)[0] == 403
    assert client.request()[0] == 200 and not (folder / "picks.jsonl").exists()


def test_only_listed_images_are_served(client, session, folder):
    (folder.parent / "secret.png").write_bytes(b"secret")
    code = client.ask("state")[1]["pair"]["first"]
    status, headers, content = client.request(path=f"image/{code}")
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert content == (folder / session.codes[code]).read_bytes()
    for path in ("image/../../secret.png", "image/a0.png", "image/%2e%2e/secret.png", "image/", "../manifest.jsonl"):
        assert client.request(path=path)[0] == 404, path
    (folder / session.codes[code]).unlink()
    assert client.request(path=f"image/{code}")[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[1]",
        b"[" * 50_000,
        {},
        {"first": "..", "second": "..", "verdict": "first"},
        {"first": {}, "second": [], "verdict": 1},
    ],
)
def test_nonsense_is_refused_and_the_server_goes_on(client, body):
    assert client.request("POST", "pick", body)[0] == 400
    assert client.ask("state")[0] == 200


def test_a_port_in_use_is_an_error(session):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for wrong in (port, 99999):
            with pytest.raises(ValueError, match=str(wrong)):
                PickServer(session, port=wrong)


def test_a_full_disk_is_reported_and_no_pick_is_lost(client, folder, monkeypatch):
    def judge():
        pair = client.ask("state")[1]["pair"]
        return client.ask("pick", first=pair["first"], second=pair["second"], verdict="first")

    def full(*ignored):
        raise OSError(28, "No space left on device")

    judge()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        status, answer = judge()
        assert status == 507 and "No space" in answer["error"]
    assert client.ask("state")[1]["judged"] == 1
    assert json.loads((folder / "picks.jsonl").read_text())["verdict"] == "first"
