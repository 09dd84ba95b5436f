"""The local Hub that publishing is tested against: the real client's uploads arrive byte for byte, and only with the
token."""

import hashlib

import pytest
import torch
from huggingface_hub import HfApi, create_repo, hf_hub_download, upload_folder, whoami
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tmp_path):
    """A small text, a small file of weights, and one that is uploaded in three parts."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Model\n", encoding="utf-8")
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")
    save_file({"a": torch.arange(4.0)}, folder / "small.safetensors")
    save_file({"b": torch.randn(600_000, generator=generator)}, folder / "unet" / "large.safetensors")
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_arrives_byte_for_byte(hub_server, folder):
    url = create_repo("model")
    done = upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Tuned")
    repo = hub_server.repos["tester/model"]
    assert repo.files == contents(folder)
    assert repo.lfs == {"small.safetensors", "unet/large.safetensors"}
    assert [commit.summary for commit in repo.commits] == ["Tuned"]
    assert done.oid == repo.sha


def test_large_weights_travel_in_parts_and_small_ones_whole(hub_server, folder):
    upload_folder(repo_id=create_repo("model").repo_id, folder_path=folder)
    small = hashlib.sha256((folder / "small.safetensors").read_bytes()).hexdigest()
    assert (folder / "unet" / "large.safetensors").stat().st_size > 2 * 2**20
    assert hub_server.uploaded_parts == 3
    assert f"/lfs/{small}" in hub_server.paths("PUT")
    assert len(hub_server.verified) == 2


def test_what_was_uploaded_can_be_downloaded(hub_server, folder, tmp_path):
    upload_folder(repo_id=create_repo("model").repo_id, folder_path=folder)
    file = hf_hub_download("tester/model", "large.safetensors", subfolder="unet", cache_dir=tmp_path / "cache")
    torch.testing.assert_close(
        load_file(file)["b"], load_file(folder / "unet" / "large.safetensors")["b"], rtol=0, atol=0
    )
    assert sorted(HfApi().list_repo_files("tester/model")) == sorted(contents(folder))
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("tester/model", "missing.json", cache_dir=tmp_path / "cache")


def test_unchanged_files_are_not_sent_again(hub_server, folder):
    create_repo("model")
    upload_folder(repo_id="tester/model", folder_path=folder)
    upload_folder(repo_id="tester/model", folder_path=folder)
    (folder / "unet" / "config.json").write_text('{"a": 1}', encoding="utf-8")
    upload_folder(repo_id="tester/model", folder_path=folder)
    repo = hub_server.repos["tester/model"]
    assert [sorted(commit.changes) for commit in repo.commits] == [sorted(contents(folder)), ["unet/config.json"]]
    assert hub_server.uploaded_parts == 3


def test_files_can_be_deleted(hub_server, folder):
    create_repo("model")
    upload_folder(repo_id="tester/model", folder_path=folder)
    (folder / "small.safetensors").unlink()
    upload_folder(repo_id="tester/model", folder_path=folder, delete_patterns="*.safetensors")
    assert hub_server.repos["tester/model"].files == contents(folder)


def test_the_token_is_asked_for(hub_server, folder):
    assert whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError, match="401"):
        create_repo("model", token="hf_wrong")
    create_repo("model")
    with pytest.raises(HfHubHTTPError, match="401"):
        upload_folder(repo_id="tester/model", folder_path=folder, token="hf_wrong")
    assert hub_server.repos["tester/model"].commits == []


def test_the_token_travels_in_the_header_alone(hub_server, folder):
    upload_folder(repo_id=create_repo("model").repo_id, folder_path=folder)
    asked = [request for request in hub_server.requests if request.path.endswith(("create", "commit/main", "verify"))]
    assert len(asked) == 4 and all(request.authorized for request in asked)
    assert not any(request.authorized for request in hub_server.requests if request.path.startswith("/lfs/"))
    assert not any(hub_server.token.encode() in request.body for request in hub_server.requests)


def test_a_repository_is_made_once_and_keeps_its_visibility(hub_server, folder):
    create_repo("model", private=True)
    assert create_repo("model", exist_ok=True).repo_id == "tester/model"
    assert hub_server.repos["tester/model"].private
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo("model")
    with pytest.raises(RepositoryNotFoundError):
        upload_folder(repo_id="tester/other", folder_path=folder)


def test_bad_metadata_is_refused_before_anything_is_sent(hub_server, folder):
    (folder / "README.md").write_text("---\nbase_model: /home/someone/sd\n---\n", encoding="utf-8")
    create_repo("model")
    with pytest.raises(ValueError, match="base_model"):
        upload_folder(repo_id="tester/model", folder_path=folder)
    assert hub_server.repos["tester/model"].commits == []
