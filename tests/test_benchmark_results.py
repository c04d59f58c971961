"""Result files keep one schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
HEAD = {"schema": int, "suite": str, "commit": str, "date": str, "device": str}
RESULT = {"group": str, "name": str, "median_s": float, "iqr_s": float, "rounds": int}


def test_there_are_results() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_schema(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    for key, kind in HEAD.items():
        assert isinstance(record[key], kind), key
    assert record["schema"] == 1
    assert path.name.startswith(record["suite"] + "--") and path.stem.endswith(record["device"])
    assert {"cpu", "cores", "threads", "isa"} <= record["machine"].keys()
    assert {"python", "torch"} <= record["versions"].keys()
    if record["suite"] == "demo":
        assert record["evaluation"]["reconstructions"] and record["validation"]
        return
    if record["suite"] in ("compare", "robustness"):
        check_comparisons(record)
        return
    if record["suite"] == "mismatches":
        for result in record["results"]:
            assert result["group"].split(",")[0] in record["data"] and result["name"]
            assert 0 <= result["wrong_codes"] <= result["of"]
            assert result["wrong_codes"] == 0 or result["name"] != "msvq_fast"
        return
    if record["device"] == "cuda":
        assert {"gpu", "ceilings"} <= record["machine"].keys()
        for missing in record["missing"]:
            assert missing["kind"] in ("skipped", "error", "dropped")
            assert missing["group"] and missing["name"] and missing["reason"]
            assert "\n" not in missing["reason"]
        for result in record["results"]:
            extra = result["extra"]
            assert extra["peak_bytes"] >= 0 and extra["wall_s"] > 0
            if result["name"].startswith("msvq_fast"):
                assert extra["floor_s"] > 0 and extra["percent_of_floor"] > 0
                assert "reference" not in extra["backends"].values()
                assert extra.get("wrong_codes", 0) == 0
    assert record["results"] or record["missing"]
    for result in record["results"]:
        for key, kind in RESULT.items():
            assert isinstance(result[key], kind), key
        assert result["median_s"] > 0 and result["iqr_s"] >= 0 and isinstance(result["extra"], dict)


def check_comparisons(record: dict) -> None:
    assert record["data"] and record["comparisons"]
    for comparison in record["comparisons"]:
        assert {"steps", "batch_size", "width_scale", "seeds"} <= comparison["settings"].keys()
        assert comparison["models"].keys() == comparison["paper"].keys() == {"vqvae2", "msvqvae"}
        for model in comparison["models"].values():
            assert model["seeds"] == comparison["settings"]["seeds"]
            measured = [
                run["reconstructions"][-1]["mse"]
                for run in comparison["runs"]
                if run["preset"] == model["preset"]
            ]
            assert model["figures"]["mse"]["values"] == measured
        assert all(len(run["weights_sha256"]) == 64 for run in comparison["runs"])
