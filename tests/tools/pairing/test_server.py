"""The server answers its own page and nobody else."""

import io
import json
import socket
import struct
import time

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo.tools.pairing.server import PickServer


def test_a_page_of_another_name_is_refused(client):
    assert client.request()[0] == 200
    assert client.request(host="localhost:9000")[0] == 200  # through a tunnel
    names = ["evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "192.168.1.7", "[bad", "x y"]
    for host in [*names, *(f"{name}:{client.port}" for name in names), ":1"]:
        assert client.request(host=host)[0] == 421, host


def test_without_the_token_there_is_nothing(client):
    for token in ("", "x", client.server.token[:-1], client.server.token + "x", "ü"[:0] + "%C3%BC"):
        status, _, content = client.request(token=token)
        assert status == 403 and client.server.token.encode() not in content


def test_a_pick_from_another_origin_is_refused(client, folder):
    state = client.ask("state")[1]
    pick = {"tab": "tab", **state["pair"], "verdict": "first"}
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Content-Type": "text/plain"}):
        assert client.request("POST", "pick", pick, **headers)[0] in (400, 403)
    assert client.request("POST", "pick", b"x" * 300_000)[0] == 413
    assert (folder / "picks.jsonl").read_bytes() == b""


def test_only_listed_images_are_served(client, folder):
    (folder.parent / "secret.png").write_bytes(b"secret")
    code = client.ask("state")[1]["pair"]["first"]
    status, headers, _ = client.request(path=f"image/{code}")
    assert status == 200 and headers["Content-Type"] == "image/png" and headers["X-Content-Type-Options"] == "nosniff"
    for path in ("image/../../secret.png", "image/a0.png", "image/%2e%2e/secret.png", "image/", "../manifest.jsonl"):
        assert client.request(path=path)[0] == 404, path


def test_an_image_that_became_a_link_out_of_the_folder_is_not_served(client, session, folder):
    (folder.parent / "secret.png").write_bytes(b"secret")
    code = client.ask("state")[1]["pair"]["first"]
    path = folder / session.codes[code]
    path.unlink()
    path.symlink_to(folder.parent / "secret.png")
    assert client.request(path=f"image/{code}")[0] == 404


def test_the_page_allows_no_script_but_its_own(client):
    _, headers, page = client.request()
    policy = headers["Content-Security-Policy"]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert "default-src 'none'" in policy and "unsafe" not in policy and page.count(nonce.encode()) == 2
    assert b"http://" not in page and b"https://" not in page


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[1]",
        b"[" * 50_000,
        {"tab": "x"},
        {"tab": "x", "first": "..", "second": "..", "verdict": "first"},
        {"tab": "x", "first": {}, "second": [], "verdict": 1},
        {"tab": [[1]], "first": "..", "second": "..", "verdict": "first"},
    ],
)
def test_nonsense_is_refused_and_the_server_goes_on(client, body):
    assert client.request("POST", "pick", body)[0] == 400
    assert client.ask("state")[0] == 200


def test_an_image_is_not_compared_with_itself(client, folder):
    pair = client.ask("state")[1]["pair"]
    assert client.ask("pick", first=pair["first"], second=pair["first"], verdict="first")[0] == 400
    assert (folder / "picks.jsonl").read_bytes() == b""


def test_a_tab_that_is_a_list_may_come_late(client):
    pair = client.ask("state")[1]["pair"]
    pick = {"first": pair["first"], "second": pair["second"], "verdict": "first"}
    assert client.ask("pick", **pick)[0] == 200
    assert client.ask("pick", tab=["list"], **pick)[0] == 409


@pytest.mark.parametrize(
    "request_text",
    [
        "GET http://[ HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "POST /TOKEN/pick HTTP/1.1\r\nHost: HOST\r\nOrigin: http://HOST\r\nContent-Type: application/json\r\n"
        f"Content-Length: {'9' * 5000}\r\n\r\n",
    ],
)
def test_an_odd_request_is_refused_without_a_traceback(client, request_text, capfd):
    host = f"127.0.0.1:{client.port}"
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(request_text.replace("HOST", host).replace("TOKEN", client.server.token).encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 4")
    assert client.ask("state")[0] == 200 and "Traceback" not in capfd.readouterr().err


def test_a_tab_that_is_closed_early_is_no_error(client, session, folder, capfd):
    name = session.codes[client.ask("state")[1]["pair"]["first"]]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)).save(folder / name)
    code = next(code for code, listed in session.codes.items() if listed == name)
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        linger = struct.pack("ii", 1, 0)  # a reset in place of an orderly end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        path = f"/{client.server.token}/image/{code}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n\r\n".encode())
        connection.recv(100)
    assert client.ask("state")[0] == 200
    time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


def test_images_are_shown_as_training_reads_them(client, session, folder):
    """Transparency is white, 16 bits are grey, and other images are sent as they are."""
    pair = client.ask("state")[1]["pair"]
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(folder / session.codes[pair["first"]])
    Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)).save(folder / session.codes[pair["second"]])
    for code, grey in ((pair["first"], 255), (pair["second"], 128)):
        status, headers, content = client.request(path=f"image/{code}")
        assert status == 200 and headers["Content-Type"] == "image/png"
        shown = Image.open(io.BytesIO(content))
        assert shown.mode == "RGB" and shown.getpixel((0, 0)) == (grey,) * 3


def test_a_prompt_with_html_is_sent_as_text_only(client, session):
    prompt = "<script>alert(1)</script>"
    state = client.ask("state")[1]
    status, state = client.ask("prompt", image=state["pair"]["first"], prompt=prompt)
    assert status == 200 and state["pair"]["prompt"] == prompt
    assert prompt.encode() not in client.request()[2]
    assert client.ask("prompt", image=state["pair"]["first"], prompt=" ")[0] == 400


def test_a_port_in_use_is_an_error_if_it_was_asked_for(session, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=str(port)):
            PickServer(session, port=port)
        with pytest.raises(ValueError, match="99999"):
            PickServer(session, port=99999)
        monkeypatch.setattr("trl_diffusion_sdpo.tools.pairing.server.USUAL_PORT", port)
        with PickServer(session) as server:
            assert server.server_address[1] != port


def test_a_page_for_the_network_takes_addresses_and_no_names(session):
    with PickServer(session, "0.0.0.0", 0) as server:
        port = server.server_address[1]
        assert server.is_own_name(f"192.168.1.7:{port}") and server.is_own_name(f"localhost:{port}")
        assert not server.is_own_name(f"evil.example:{port}") and not server.is_own_name("")


def test_a_full_disk_is_told_and_nothing_is_half_saved(client, session, folder, monkeypatch):
    state = client.ask("state")[1]
    pair = {name: state["pair"][name] for name in ("first", "second")}

    def full(*ignored):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        status, answer = client.ask("pick", **pair, verdict="first")
        assert status == 507 and "No space" in answer["error"]
    assert (folder / "picks.jsonl").read_bytes() == b"" and client.ask("state")[1]["judged"] == 0
    with monkeypatch.context() as patched:
        patched.setattr("trl_diffusion_sdpo.tools.pairing.picks.write_atomically", full)
        status, answer = client.ask("pick", **pair, verdict="first")
        assert status == 200 and answer["judged"] == 1 and "safe" in answer["problem"]
    assert json.loads((folder / "picks.jsonl").read_text())["verdict"] == "first"
