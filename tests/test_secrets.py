"""No secret gets into files, trackers or logs of a run."""

import json
import time

import pytest

from trl_diffusion_sdpo.utils.secrets import names_secret, without_secrets

SECRETS = ("s3cr3t", "hf_" + "a1B2" * 8)
KWARGS = {
    "token": "s3cr3t-1",
    "use_auth_token": True,
    "proxies": {"https": "http://someone:s3cr3t-2@proxy.example:8080", "no_proxy": "localhost"},
    "storage_options": {"client_secret": "s3cr3t-3", "nested": [{"apiKey": "s3cr3t-4"}, {"db_password": "s3cr3t-5"}]},
    "revision": "main",
    "variant": "https://cloud.example/file?X-Amz-Signature=s3cr3t-6&part=2",
}


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("hub_token", "HF_TOKEN", "authToken", "API-Key", "client_secret", "password")),
        *((name, True) for name in ("aws_access_key_id", "credentials", "Authorization", "account_key", "cookies")),
        *((name, False) for name in ("bos_token", "additional_special_tokens", "total_tokens", "signal")),
        *((name, False) for name in ("max_new_tokens", "author", "token_length", "tokenizer", "key", "secondary")),
    ],
)
def test_names_of_secrets(name, secret):
    assert names_secret(name) is secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"with {SECRETS[1]} inside", "with hf_... inside"),
        ("https://me:pw@host/path?x=1", "https://...@host/path?x=1"),
        ("https://host/a?token=abc&page=2#part", "https://host/a?token=...&page=2#part"),
        (
            "https://s3/a?X-Amz-Credential=AKIA&X-Amz-Signature=f00",
            "https://s3/a?X-Amz-Credential=...&X-Amz-Signature=...",
        ),
        ("AccountName=me;AccountKey=f00==;Suffix=x", "AccountName=me;AccountKey=...;Suffix=x"),
        ("of token_length=77, max_tokens=5, key=len", "of token_length=77, max_tokens=5, key=len"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ..."),
        ("me/model at main, a@b.example, 5 > 4?", "me/model at main, a@b.example, 5 > 4?"),
        (f"run_{SECRETS[1]}", "run_hf_..."),
        (f"hf_oauth_eyJhbGciOi.{'a1B2' * 8}.c3-d4_", "hf_..."),
        ("sk-proj-" + "a1B2" * 8, "..."),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVm", "..."),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "..."),
        ("https://me:p@ss@w0rd@host:80/a@b", "https://...@host:80/a@b"),
        ("https://me:p/ss#w?d@host/a", "https://...@host/a"),
        ("//me:pw@host/share", "//...@host/share"),
        ("https://host:443/a@b, http://[::1]:80/a@b", "https://host:443/a@b, http://[::1]:80/a@b"),
        ("hf://datasets/me/pairs@main/a.parquet", "hf://datasets/me/pairs@main/a.parquet"),
        ("{'password': 's3cr3t, \\'x', 'user': 'me'}", "{'password': '...', 'user': 'me'}"),
        ('{"api_key": "s3cr3t", "n": 1}', '{"api_key": "...", "n": 1}'),
        ('"{\\"api_key\\": \\"s3cr3t\\", \\"n\\": 1}"', '"{\\"api_key\\": \\"...\\", \\"n\\": 1}"'),
        ("token: s3cr3t\nbeta: 2000", "token: ...\nbeta: 2000"),
        ("x-api-key: s3cr3t", "x-api-key: ..."),
        ("Authorization: abcdefghij", "Authorization: ..."),
        ("--hub_token s3cr3t --beta 5", "--hub_token ... --beta 5"),
        ("config: 'token=s3cr3t'", "config: 'token=...'"),
        ('"token": "s3cr3t and then cut', '"token": "...'),
        ("'tokens': ['s3cr3t', 's3cr3t'], 'n': 1", "'tokens': ..., 'n': 1"),
        (
            "https://cdn/a?Expires=5&Key-Pair-Id=K1&sig=f00&key=a",
            "https://cdn/a?Expires=5&Key-Pair-Id=...&sig=...&key=...",
        ),
    ],
)
def test_secrets_within_texts(text, shown):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 77, num_tokens=5, 'max_new_tokens': 8",
        "tokenizer: 'CLIPTokenizer', 'bos_token': '<s>', eos_token=<|endoftext|>, pad_token_id=0",
        "beta=2000.0, key: 5, keys=['a'], author: me, monkey=1, safeguard='output'",
        "a basic illustration of a bearer arrangement, 16:9, by author: someone",
        "token=None, use_auth_token=True, 'hub_token': null, hub_token='', \"token\": '...'",
        "The LoRA has tokens of 77 words. Secret garden, passwords are forbidden",
        "checkpoint hf_hub_download, hf_transfer, task-specific-configuration-of-models",
        "http://localhost:8080/v1, s3://bucket/key=5/part=3, C:\\me\\a.png, //server/share",
    ],
)
def test_ordinary_text_is_left_as_it_is(text):
    assert without_secrets(text) == text


def test_long_texts_are_searched_in_time_that_grows_with_their_length():
    for unit in ("a", "-", "token: ", "//a:", "'token': '", "eyJ", "hf_", "[", "\\", "a@", " "):
        start = time.process_time()
        without_secrets(unit * (200_000 // len(unit)))
        assert time.process_time() - start < 5, unit


def test_arguments_show_no_secret_anywhere(make_args):
    args = make_args(model_init_kwargs=KWARGS, hub_token=SECRETS[1], run_name=f"run of {SECRETS[1]}")
    for shown in (str(args), repr(args), f"{args!r:}", json.dumps(args.to_dict()), args.to_json_string()):
        assert not any(secret in shown for secret in SECRETS)
        assert "<TOKEN>" in shown and "<CLIENT_SECRET>" in shown and "http://...@proxy.example:8080" in shown
        assert "'revision': 'main'" in shown or '"revision": "main"' in shown
    assert not any(secret in str(args.to_sanitized_dict()) for secret in SECRETS)
    assert args.hub_token == SECRETS[1] and args.model_init_kwargs == KWARGS


def test_neither_files_nor_trackers_of_a_run_hold_a_secret(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "run" / "runs"))
    kwargs = {name: value for name, value in KWARGS.items() if name in ("token", "revision", "proxies")}
    trainer = make_trainer(
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to="tensorboard",
        hub_token=SECRETS[1],
        model_init_kwargs=kwargs,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any("tfevents" in file.name for file in files) and any(file.name == "training_args.json" for file in files)
    for file in files:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), file
