"""Saved models beside the weights: where they are found, their card, and the way to the hub."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from msvq_fast.nn.saved import check_no_run
from msvq_fast.ops.checks import InputError

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
_CHUNK = 1 << 20  # bytes
_COLUMNS = {  # of an evaluation's reconstructions
    "mse": ("MSE", "{:.5f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
}


def model_card(
    values: dict[str, Any], parameters: int, results: dict[str, Any] | None = None
) -> str:
    """The text of a saved model's ``README.md``.

    Args:
        values: Its ``config.json``.
        parameters: How many are trained; codebooks are moving averages and not among them.
        results: An evaluation's ``results.json``, see `read_results`.
    """
    name, grids = values["model"], " and ".join(f"{side}x{side}" for side in values["latents"])
    parts = [
        "---\nlibrary_name: msvq_fast\ntags: [vector-quantization, image-tokenizer]\n---",
        f"# {name}, {values['resolution']} px",
        f"Images of {values['resolution']} px as {grids} codes of {values['num_codes']} each, "
        f"coarse to fine; {parameters:,} parameters.",
        "## Use",
        "```python\nimport msvq_fast\n\n"
        f"model = msvq_fast.{name}.from_pretrained(FOLDER_OR_REPOSITORY)\n"
        "codes = model.eval().encode(images)  # (B, 3, H, W) in [-1, 1]\n"
        "images = model.decode(codes)\n```",
        "## Measured",
        "Nothing yet: `msvq evaluate`." if results is None else _measured(results),
        "## Configuration",
        "| field | value |\n|---|---|\n"
        + "\n".join(f"| `{field}` | {json.dumps(value)} |" for field, value in values.items()),
    ]
    return "\n\n".join(parts) + "\n"


def read_results(path: str | Path, folder: Path) -> dict[str, Any]:
    """An evaluation's ``results.json``, if it is one of the model saved in ``folder``.

    Raises:
        InputError: If it cannot be read or is of other weights.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        measured = results["settings"]["weights_sha256"]
        _measured(results)
    except OSError as error:
        raise InputError(f"results={str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"results={str(path)!r} is not what msvq evaluate writes: {error!r}"
        ) from None
    if measured != weights_digest(folder):
        raise InputError(f"results={str(path)!r} is of other weights, SHA-256 {measured}")
    return results


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of a saved model's weights in hexadecimal."""
    digest = hashlib.sha256()
    with (folder / WEIGHTS_FILE).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def upload(folder: Path, repo_id: str, *, private: bool, token: str | bool | None) -> str:
    """Send a folder to the hub's repository, made if missing; return the commit's address.

    Raises:
        InputError: With what the hub says, in one line.
    """
    from huggingface_hub import HfApi

    try:
        # Read from a file it ends with a new line, which no request can send.
        api = HfApi(token=token.strip() if isinstance(token, str) else token)
        # The hub makes a name without an owner one's own; only the whole name can be uploaded to.
        whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=whole, folder_path=folder).commit_url)
    except Exception as error:  # the hub client raises a type per cause
        raise InputError(f"repo_id={repo_id!r}: the hub says: {_one_line(error)}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The values of ``folder/config.json``; raises `InputError` naming the file if it is bad."""
    check_no_run(folder)
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("model"), str):
            raise ValueError("no field 'model' with a name")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist; expected a folder of a saved model") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not the configuration of a model: {error}") from None
    return values


def local_folder(source: str | Path) -> Path:
    """A folder itself, or where the hub's repository ``owner/name`` was downloaded to.

    Raises:
        InputError: If the hub cannot give it; a folder need not exist.
    """
    folder = Path(source)
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # the hub client raises a type per cause
        said = _one_line(error)
        raise InputError(f"{source} is no local folder and the hub says: {said}") from None


def _measured(results: dict[str, Any]) -> str:
    """The table of an evaluation: a row per scale."""
    settings, quality = results["settings"], results["reconstructions"]
    shown = {name: column for name, column in _COLUMNS.items() if quality[0].get(name) is not None}
    lines = [
        f"{results['images']} images of {settings['size']} px, values in [0, 1], with msvq_fast "
        f"{settings['versions']['msvq_fast']}.",
        "",
        f"| scale | {' | '.join(title for title, _ in shown.values())} | codes used | perplexity |",
        "|---" * (len(shown) + 3) + "|",
    ]
    by_scale = {row["scale"]: row for row in quality}
    for book in results["codebooks"]:
        row = by_scale.get(book["scale"], {})
        cells = [
            form.format(row[name]) if row.get(name) is not None else "-"
            for name, (_, form) in shown.items()
        ]
        cells += [f"{book['usage']:.1f} %", f"{book['perplexity']:.1f}"]
        lines.append(f"| {book['scale']} | {' | '.join(cells)} |")
    if (whole := results.get("reconstructed_set")) is not None:
        suffix = whole["suffix"]
        figures = [f"KID{suffix} {whole['kid']:.5f}"]
        if whole["fd"] is not None:
            figures.insert(0, f"{f'FD{suffix}' if suffix else 'FID'} {whole['fd']:.3f}")
        lines += [
            "",
            f"{', '.join(figures)} of {whole['images']} reconstructions against "
            f"{whole['originals']} originals ({whole['extractor']}, weights "
            f"{whole['sha256'][:16]}).",
        ]
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    # The client's first line is often the status alone; what went wrong and why comes below it,
    # and of an upload, for which it raises a type that is not its own, in the cause.
    told: list[BaseException] = [error]
    if type(error) is RuntimeError and error.__cause__:
        told.append(error.__cause__)
    text = " ".join(" ".join(map(str, told)).split())
    # What follows an address may be a signature that opens a private file for a while.
    text = re.sub(r"(https?://[^\s?]+)\?[^\s']*", r"\1", text)
    text = re.sub(r"Bearer [^']*", "Bearer ...", text)  # a header with a token that cannot be sent
    return text or type(error).__name__
