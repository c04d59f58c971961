"""Model cards and the hub, which is never reached: its client is a stand-in."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from msvq_fast.cli import main
from msvq_fast.models import VQVAE2, from_preset, from_pretrained, weights_digest
from msvq_fast.ops import InputError


class Hub:
    """Folders by repository, with the calls of the hub's client that the package makes."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def __call__(self, token: str | None = None) -> Hub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> SimpleNamespace:
        target = self.root / repo_id
        target.mkdir(parents=True)
        for path in folder_path.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(commit_url=f"hub://{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        if not (self.root / repo_id).is_dir():
            raise OSError("404 Client Error.\n\nRepository Not Found for url: http://hub.")
        assert set(allow_patterns) == {"config.json", "model.safetensors"}
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    from_preset("vqvae2-tiny").save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def evaluate(saved: Path, *options: str) -> dict[str, Any]:
    out = saved / "evaluation"
    command = ["evaluate", f"--checkpoint={saved}", f"--out={out}", "--resize=64", "--limit=1"]
    assert main([*command, "--crop=center", "--device=cpu", *options]) == 0
    return json.loads((out / "results.json").read_text())


def test_the_card_states_what_was_saved_and_measured(saved: Path, tmp_path: Path) -> None:
    card = (saved / "README.md").read_text()
    parameters = sum(p.numel() for p in from_pretrained(saved).parameters())
    assert f"8x8 and 16x16 codes of 128 each, coarse to fine; {parameters:,} parameters" in card
    assert '| `model` | "VQVAE2" |' in card and "| `latents` | [8, 16] |" in card
    assert "Nothing yet" in card
    results = evaluate(saved)
    from_pretrained(saved).save_pretrained(
        tmp_path / "again", results=saved / "evaluation" / "results.json"
    )
    assert weights_digest(tmp_path / "again") == weights_digest(saved)
    card = (tmp_path / "again" / "README.md").read_text()
    quality, book = results["reconstructions"][0], results["codebooks"][1]
    expected = f"| 1 | {quality['mse']:.5f} | {quality['psnr']:.2f} | {quality['ssim']:.4f} | "
    assert expected + f"{book['usage']:.1f} % | {book['perplexity']:.1f} |" in card
    assert "| 0 | - | - | - |" in card, "VQ-VAE 2 has no reconstruction of scale 0 alone"


def test_the_card_names_the_network_behind_a_distance(saved: Path, tmp_path: Path) -> None:
    results = evaluate(saved)
    whole = {"suffix": "-Eff", "extractor": "EffLite0", "sha256": "ab" * 32, "images": 9}
    results["reconstructed_set"] = {**whole, "originals": 12, "fd": None, "kid": 0.25}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    model = from_pretrained(saved)
    model.save_pretrained(tmp_path / "a", results=path)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "\nKID-Eff 0.25000 of 9 reconstructions against 12 originals (EffLite0" in card
    results["reconstructed_set"].update(fd=1.5, suffix="")
    path.write_text(json.dumps(results))
    model.save_pretrained(tmp_path / "a", results=path)
    assert "\nFID 1.500, KID 0.25000 of 9" in (tmp_path / "a" / "README.md").read_text()


def test_figures_of_other_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    evaluate(saved)
    model = from_pretrained(saved)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    results = saved / "evaluation" / "results.json"
    with pytest.raises(InputError, match="is of other weights"):
        model.save_pretrained(tmp_path / "other", results=results)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        model.save_pretrained(tmp_path / "other", results=tmp_path / "nowhere.json")
    for text in ("{", "[]", '{"settings": {"weights_sha256": ""}}'):
        results.write_text(text)
        with pytest.raises(InputError, match="is not what msvq evaluate writes"):
            model.save_pretrained(tmp_path / "other", results=results)


def test_a_model_goes_to_the_hub_and_comes_back(
    saved: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(saved)
    capsys.readouterr()
    assert main(["push", f"--checkpoint={saved}", "--repo=me/model", "--private"]) == 0
    assert capsys.readouterr().out == "hub://me/model/commit/1\n"
    assert hub.calls == [("token", None), ("create", "me/model", True)]
    files = {path.name for path in (hub.root / "me/model").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}
    assert "| 1 | 0." in (hub.root / "me/model" / "README.md").read_text()
    from_pretrained(saved).push_to_hub("me/other", token="secret\n")
    assert hub.calls[2:] == [("token", "secret"), ("create", "me/other", False)]
    x = torch.zeros(1, 3, 64, 64)
    expected = from_pretrained(saved).encode(x)
    for load in (from_pretrained, VQVAE2.from_pretrained):
        found = load("me/model").encode(x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_run_without_its_evaluation_goes_without_a_table(
    saved: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", f"--checkpoint={saved}", "--repo=me/model"]) == 0
    assert "the card has no table" in capsys.readouterr().out
    assert "Nothing yet" in (hub.root / "me/model" / "README.md").read_text()
    results = saved / "evaluation" / "results.json"
    assert main(["push", f"--checkpoint={saved}", "--repo=me/b", f"--results={results}"]) == 2
    assert "cannot be read" in capsys.readouterr().err and not (hub.root / "me/b").exists()


def test_a_name_without_an_owner_is_ones_own(saved: Path, hub: Hub) -> None:
    assert from_pretrained(saved).push_to_hub("model") == "hub://me/model/commit/1"


def test_the_clients_own_way_to_ask_for_the_stored_token_is_taken(saved: Path, hub: Hub) -> None:
    from_pretrained(saved).push_to_hub("me/model", token=True)
    assert hub.calls[0] == ("token", True)


def test_no_error_shows_a_token(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:  # which never answers
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(InputError, match=r"header value:? b?'Bearer") as raised:
            from_pretrained(saved).push_to_hub("me/model", token="hf_\nzebra")
    assert "zebra" not in str(raised.value)


def test_what_the_hub_says_is_one_line_with_the_reason(
    saved: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "404 Client Error. Repository Not Found for url: http://hub."
    with pytest.raises(InputError, match=f"no local folder and the hub says: {said}$"):
        from_pretrained("me/nothing")

    for folder in ("./nothing", "/nothing"):  # no names of repositories
        with pytest.raises(InputError, match=r"nothing/config\.json does not exist"):
            from_pretrained(folder)

    def refuse(*_: object, **__: object) -> None:
        signed = "https://hub/file?Signature=secret"
        cause = OSError(f"\n\n403 Forbidden: no rights.\nCannot access '{signed}' now.")
        raise RuntimeError("Error while uploading.") from cause

    monkeypatch.setattr(hub, "create_repo", refuse)
    assert main(["push", f"--checkpoint={saved}", "--repo=me/model"]) == 2
    said = "Error while uploading. 403 Forbidden: no rights. Cannot access 'https://hub/file' now."
    expected = f"repo_id='me/model': the hub says: {said}"
    assert capsys.readouterr().err == f"msvq: error: {expected}\n"
