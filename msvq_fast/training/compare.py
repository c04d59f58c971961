"""MS-VQVAE beside VQ-VAE 2 at equal latents, over seeds: train, judge, report as the paper does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msvq_fast.data import list_images
from msvq_fast.models import preset_config
from msvq_fast.ops import InputError
from msvq_fast.training.checkpoint import find_model, list_checkpoints
from msvq_fast.training.compare_config import BASELINE, CompareConfig
from msvq_fast.training.compare_figures import PICTURES, draw_comparison
from msvq_fast.training.compare_report import describe, print_comparison, summarize
from msvq_fast.training.distributed import choose_device, require_one_process
from msvq_fast.training.evaluate import run_evaluate
from msvq_fast.training.judges import load_judges
from msvq_fast.training.loop import run_train
from msvq_fast.training.progress import is_running
from msvq_fast.training.results import RESULTS_FILE, check_writable, write_json

COMPARISON_FILE, TABLE_FILE, SETTINGS_FILE = "comparison.json", "table.txt", "settings.json"


def run_compare(config: CompareConfig) -> int:
    """``msvq compare``: train what is not trained yet, judge it, write table and figures.

    Returns:
        Exit code: 0 at the end, 128 plus the signal's number where a training was stopped.

    Raises:
        InputError: For settings that cannot work, or an ``out`` that holds another comparison.
    """
    config.check()
    require_one_process("compare", "start several with other seeds and the same out")
    out = Path(config.out)
    plans = {
        (preset, seed): out / "runs" / f"{preset}-seed{seed}"
        for seed in config.seeds
        for preset in (BASELINE + config.preset, config.preset)
    }
    for preset in (config.preset, BASELINE + config.preset):
        training = config.training(preset, config.seeds[0], "")
        training.check()
        preset_config(preset, **training.model.given())
    for data, split in ((config.data, "train"), (config.data, "val"), (_pictures(config), "val")):
        list_images(data, split=split)
    # A wrong weights file should not be found out after the training.
    load_judges(config.evaluation("", ""), choose_device(config.device))
    check_writable(out)
    _claim(out, config.settings())
    for (preset, seed), folder in plans.items():
        if _result_file(folder).exists():
            print(f"{preset}, seed {seed}: finished before, in {folder}", flush=True)
            continue
        print(f"{preset}, seed {seed}: into {folder}", flush=True)
        if code := run_train(config.training(preset, seed, str(folder))):
            return code
        run_evaluate(config.evaluation(str(folder), str(_result_file(folder).parent)))
    results = {plan: _read_result(folder) for plan, folder in plans.items()}
    summary = summarize(config.preset, results)
    record = {
        "settings": {**config.settings(), "seeds": list(config.seeds)},
        **summary,
        "half_power_cycles": {},
        "runs": [
            {"preset": preset, "seed": seed, **result} for (preset, seed), result in results.items()
        ],
    }
    write_json(out / COMPARISON_FILE, record)
    with (out / TABLE_FILE).open("w", encoding="utf-8") as file:
        print_comparison(summary, file)
    print_comparison(summary)
    for line in describe(summary):
        print(line, flush=True)
    # Pictures last, so that one that cannot be drawn does not cost the figures.
    write_json(out / COMPARISON_FILE, {**record, "half_power_cycles": _draw(config, out, plans)})
    for name in PICTURES:
        print(f"wrote {out / name}")
    return 0


def _draw(
    config: CompareConfig, out: Path, plans: dict[tuple[str, int], Path]
) -> dict[str, float | None]:
    """The figures, of the first seed."""
    seed = config.seeds[0]
    names = {"vqvae2": BASELINE + config.preset, "msvqvae": config.preset}
    folders = {key: find_model(plans[name, seed]) for key, name in names.items()}
    given = config.training(config.preset, seed, "").model.given()
    return draw_comparison(
        folders,
        out,
        data=_pictures(config),
        size=preset_config(config.preset, **given).resolution,
        resize=config.resize,
        device=choose_device(config.device),
    )


def _pictures(config: CompareConfig) -> str:
    return config.pictures or config.data


def _result_file(folder: Path) -> Path:
    return folder / "evaluation" / RESULTS_FILE


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Note what ``out`` compares, or raise where runs of something else have begun."""
    file = out / SETTINGS_FILE
    if file.exists():
        try:
            before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is corrupt: {error}") from None
        changed = [
            f"{name} is {before.get(name)} there and {value} here"
            for name, value in settings.items()
            if before.get(name) != value
        ]
        if changed and any(_has_begun(run) for run in (out / "runs").glob("*")):
            raise InputError(
                f"out={str(out)!r} holds another comparison: {'; '.join(changed)}; "
                "choose another out"
            )
    write_json(file, settings)


def _has_begun(run: Path) -> bool:
    """Whether there is something that later runs would be compared with."""
    return bool(list_checkpoints(run)) or _result_file(run).exists() or is_running(run)


def _read_result(folder: Path) -> dict[str, Any]:
    file = _result_file(folder)
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is corrupt: {error}; delete it to judge the run again") from None
    return result
