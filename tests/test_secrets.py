"""No secret gets into files, trackers or logs of a run."""

import json

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
    ],
)
def test_secrets_within_texts(text, shown):
    assert without_secrets(text) == shown


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
