"""Published rows are read, completed and converted by stated rules, and scored by stated measures."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import fields

from picotron.errors import PlanError
from picotron.planner.cases import PRODUCT_FORMATS
from tests.test_benchmarks import ROOT, run_script

TABLE = ROOT / "benchmarks" / "data" / "measured.csv"
HEADER = TABLE.read_text(encoding="utf-8").splitlines()[0]


@pytest.fixture(scope="module")
def package() -> Any:
    """The package of published rows, imported as the benchmark does."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("published")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def rows(package: Any) -> list[Any]:
    return list(package.read_rows(TABLE))


def written(path: Path, *cells: dict[str, object]) -> Path:
    """A file with the table's header and these rows, all other cells empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HEADER.split(","), restval="")
        writer.writeheader()
        writer.writerows(cells)
    return path


GOOD: dict[str, object] = {
    "model_name": "Llama 3 8B",
    "gpu": "H100",
    "n_gpus": 8,
    "tokens_per_s_per_gpu": 9000,
}


def test_every_row_is_read_or_skipped_with_a_reason(package: Any, rows: list[Any]) -> None:
    """All 861 rows come back in order; nearly none is skipped, and every column of the others is finite."""
    assert len(rows) == 861
    assert len({row.id for row in rows}) == 861
    skipped = [row.skipped for row in rows if row.skipped]
    assert skipped == ["model 'Nemotron V3 Ultra 550B (26.04)' is not listed, and its sizes are not stated"]
    cases = package.cases_of(package.scored(rows))
    assert len(cases) == 860
    for part in (cases.model, cases.work, cases.machine, cases.software, cases.layout):
        for column in fields(type(part)):
            assert np.isfinite(getattr(part, column.name)).all(), column.name
    layout = cases.layout
    gpus = [row.num_gpus for row in rows if not row.skipped]
    assert (layout.dp * layout.pp * layout.cp * layout.tp == gpus).all()


def test_conventions_reproduce_what_dense_rows_print_twice(package: Any, rows: list[Any]) -> None:
    """Printed tokens/s times the convention's FLOPs are the printed TFLOP/s: within 1 % in the median."""
    flops_per_token = importlib.import_module("published.conventions").flops_per_token
    off: dict[str, list[float]] = {}
    for row in rows:
        facts = row.facts
        direct = row.time_from in ("step", "tokens") and row.trust in ("A", "B")
        if row.skipped or row.sparse or not direct or not facts["tflops_per_gpu"]:
            continue
        work = flops_per_token(
            row.model,
            facts["seq_len"],
            facts["convention"],
            recompute=facts["recompute_mode"],
            params=(facts["params_b"] or 0) * 1e9,
        )
        tokens = row.work["global_batch"] * facts["seq_len"] / row.measured_step_seconds / row.num_gpus
        off.setdefault(row.family, []).append(abs(tokens * work / (facts["tflops_per_gpu"] * 1e12) - 1))
    assert set(off) >= {"lfh100", "lfa80", "lfa40", "nemo2407", "mbridge", "mlmllama", "dlperf", "internevo"}
    for family, errors in off.items():
        assert np.median(errors) < 0.01, family
        assert max(errors) < 0.04, family


def test_step_time_is_read_from_the_most_direct_figure(package: Any, tmp_path: Path) -> None:
    """Seconds first, then tokens/s, then TFLOP/s, then utilisation; a row without any is skipped."""
    work = {"tp": 1, "pp": 1, "seq_len": 8192, "global_batch": 128, "micro_batch": 1, "precision": "bf16"}
    base = {**GOOD, **work, "flops_convention": "model_full_attn"}
    flops = 6 * 7.504658432e9 + 12 * 32 * 4096 * 8192  # Llama 3 8B without its embedding
    path = written(
        tmp_path / "rows.csv",
        {**base, "step_time_s": 20},
        base,
        {**base, "tokens_per_s_per_gpu": "", "tflops_per_gpu": 500, "mfu": 0.1},
        {**base, "tokens_per_s_per_gpu": "", "mfu": 0.5},
        {**base, "tokens_per_s_per_gpu": ""},
    )
    seconds = [row.measured_step_seconds for row in package.read_rows(path)]
    tokens = 128 * 8192 / 8
    expected = [20, tokens / 9000, tokens * flops / 500e12, tokens * flops / (0.5 * 989e12)]
    assert seconds[:4] == pytest.approx(expected)
    assert package.read_rows(path)[4].skipped.startswith("no step time")


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"gpu": "TPU v5p"}, "unknown GPU"),
        ({"gpu": ""}, "the GPU is not stated"),
        ({"tp": "eight"}, "tp must be a number, got 'eight'"),
        ({"n_gpus": "-8"}, "n_gpus must be positive"),
        ({"layers": "3.5"}, "layers must be a whole number"),
        ({"step_time_s": "inf"}, "step_time_s must be positive and finite"),
        ({"tp": 3}, "must be a multiple of tp pp cp = 3"),
        ({"dp": 4, "tp": 4}, "contradicts 8 GPUs"),
        ({"global_batch": 12, "micro_batch": 1}, "no multiple of dp micro_batch"),
        ({"pp": 8, "vpp": 30}, "are more than 32 layers"),
        ({"model_name": "Somebody-MoE-90B"}, "is not listed"),
        ({"model_name": "Llama 3 8B LoRA"}, "adapters alone"),
        ({"gpu": "A100", "precision": "fp8"}, "has no fp8 products"),
        ({"precision": "int3"}, "is not a known one"),
        ({"tokens_per_s_per_gpu": "", "mfu": "130"}, "mfu must be at most 1"),
        ({"model_name": "Qwen3-Thing-999B-A9B"}, "is not listed"),
        ({"model_name": "Mamba 2.8B"}, "is not listed"),
        ({"model_name": "Mixtral 4x7B"}, "is not listed"),
        ({"model_name": "Llama-MoE 7B"}, "is not listed"),
        ({"tokens_per_s_per_gpu": "1e-14"}, "not credible"),
    ],
)
def test_a_bad_row_is_skipped_with_its_reason(
    package: Any, tmp_path: Path, cells: dict[str, object], reason: str
) -> None:
    """A row that nothing can complete, or that contradicts itself, says why; the row beside it is scored."""
    bad, good = package.read_rows(written(tmp_path / "rows.csv", {**GOOD, **cells}, GOOD))
    assert reason in bad.skipped
    assert good.skipped is None


@pytest.mark.parametrize(
    ("name", "listed", "billions"),
    [
        ("Phi-3.5-MoE", "phi-3.5-moe-42b", 41.9),
        ("Qwen3-Coder-480B-A35B", "qwen3-coder-480b-a35b", 480),
        ("Mixtral 8x22B", "mixtral-8x22b", 140.6),
        ("MiniMax-M2", "minimax-m2", 228.7),
        ("PaLM 540B", "palm-540b", 540),
        ("175B", "gpt3-175b", 174.6),
        ("Vicuna 33B", None, 33),
    ],
)
def test_a_model_is_the_one_whose_size_its_name_says(
    package: Any, tmp_path: Path, name: str, listed: str | None, billions: float
) -> None:
    """A name of another size, or of experts, is no listed model; a dense one with a size is generic."""
    models = importlib.import_module("published.models")
    row = package.read_rows(written(tmp_path / "rows.csv", {**GOOD, "model_name": name}))[0]
    assert row.facts.get("listed") == listed
    assert models.total_weights(row.model) / 1e9 == pytest.approx(billions, rel=0.06)


def test_cells_may_hold_units(package: Any, tmp_path: Path) -> None:
    """8k tokens, 1.5 s, a utilisation in per cent, and the long names of formats."""
    cells = {**GOOD, "tokens_per_s_per_gpu": "", "seq_len": "8k", "global_batch": 64, "mfu": "~40"}
    read = package.read_rows(
        written(
            tmp_path / "rows.csv", {**cells, "precision": "float8 e4m3"}, {**cells, "step_time_s": "1.5 s"}
        )
    )
    assert read[0].work["seq_len"] == 8192 and read[0].facts["mfu"] == 0.4
    assert read[0].work["product_format"] == PRODUCT_FORMATS.index("fp8")
    assert read[1].measured_step_seconds == 1.5


def test_empty_cells_are_filled_by_named_lines(package: Any, tmp_path: Path) -> None:
    """A name, a GPU and tokens/s are enough; every line that was applied is named, and lines count rows."""
    row = package.read_rows(written(tmp_path / "rows.csv", GOOD))[0]
    assert (row.model["hidden"], row.model["layers"], row.model["vocab"]) == (4096, 32, 128256)
    assert (row.layout["dp"], row.layout["tp"], row.work["seq_len"]) == (8, 1, 8192)
    assert {"model-of-that-name", "tp-1", "dp-from-gpus", "profile-of-later-years"} <= set(row.imputed)
    counts = package.counts([row.imputed, row.imputed])
    assert counts["tp-1"] == 2
    assert counts["cp-1"] == 2
    assert counts["vpp-layers-over-pp"] == 0
    assert list(counts) == [line["name"] for line in package.table()]


def test_the_imputation_table_explains_each_line(package: Any) -> None:
    """Each line has its own name, condition, value and source; each rule exists."""
    rule = importlib.import_module("published.impute").rule
    names = [line["name"] for line in package.table()]
    assert len(set(names)) == len(names)
    for line in package.table():
        assert all(line[key].strip() for key in ("column", "when", "then", "source")), line["name"]
        assert ("value" in line) != ("rule" in line), line["name"]
        assert line.get("rule", "pattern") == "pattern" or callable(rule(line["rule"]))


def test_notes_give_networks_and_layouts(package: Any, rows: list[Any]) -> None:
    """Rates printed in notes, ZeRO groups, interleaving and the end stages of a 405B reach their columns."""
    found = {row.id: row for row in rows}
    assert found["internevo-001"].machine["inter_bytes_per_second"] == 4 * 100e9 / 8 / 8
    assert found["vtrainm-001"].machine["inter_bytes_per_second"] == 800e9 / 8 / 8
    assert found["lfa80-001"].machine["inter_bytes_per_second"] == 1600e9 / 8 / 8
    assert found["dlperf-005"].machine["inter_bytes_per_second"] == 100e9 / 8 / 8
    assert found["internevo2-012"].layout["shard"] == 8
    assert found["internevo2-004"].layout["shard"] == 64
    assert found["mlm2021j-010"].layout["pp"] == 64
    assert found["mlm2021a-001"].layout["shard"] == 1
    assert found["mcore08-008"].layout["virtual_stages"] == 12
    assert found["mcore08-005"].layout["virtual_stages"] == 42
    assert (found["dgxcl31-032"].layout["ends"], found["dgxcl31-004"].layout["ends"]) == (1, 0)
    assert found["mbridge-005"].machine["devices_per_node"] == 64
    assert found["simumax-001"].memory_kind == "allocated"
    assert found["mleng-001"].memory_kind == "reserved"


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("LLAMA3.1_405B", "llama-3.1-405b"),
        ("Meta-Llama-3-8B", "llama-3-8b"),
        ("Llama-2-70b-hf", "llama-2-70b"),
        ("LLaMA-33B", "llama-30b"),
        ("Llama3.2-3B", "llama-3.2-3b"),
        ("DeepSeek V3 671B", "deepseek-v3"),
        ("DeepSeekV2-Lite", "deepseek-v2-lite"),
        ("Qwen3_235B_a22B", "qwen3-235b-a22b"),
        ("Qwen2.5-32B", "qwen2.5-32b"),
        ("GPT OSS 120B", "gpt-oss-120b"),
        ("Mixtral 8x22B", "mixtral-8x22b"),
        ("Nemotron-340B", "nemotron-4-340b"),
        ("Nemotron_3_Nano", "nemotron-3-nano-30b-a3b"),
        ("GPT3-175B", "gpt3-175b"),
        ("MPT-1b", "mpt-1b"),
        ("InternLM-20B", "internlm-20b"),
    ],
)
def test_models_are_known_by_their_usual_names(package: Any, name: str, listed: str) -> None:
    """Case, spaces, hyphens and underscores of a name do not matter."""
    model = importlib.import_module("published.models").known_model(name, {})
    assert model is not None
    assert model["name"] == listed


def test_every_listed_model_has_about_the_weights_of_its_name(package: Any) -> None:
    """Sizes typed by hand come to the number of parameters that the name promises, within 5 %."""
    read = importlib.import_module("published.read")
    models = importlib.import_module("published.models")
    row = {"seq_len": 2048, "windowed_share": None}
    for model in models._table()["models"]:
        size = re.search(r"-(\d+(?:\.\d+)?)([bmt])(?:\b|-)", model["name"])
        unit = {"m": 1e-3, "b": 1, "t": 1e3}
        named = model.get("params_b") or (float(size[1]) * unit[size[2]] if size else 0)
        if named:
            billions = models.total_weights(read._model({**row, **model})) / 1e9
            slack = 0.09 if model["style"] == "nemotron-h" else 0.05  # Mamba layers in whole heads
            assert math.isclose(billions, named, rel_tol=slack), (model["name"], billions)


def test_ranks_share_ties_and_scores_match_by_hand(package: Any) -> None:
    """Rank correlation and regret of small lists, worked by hand."""
    scores = importlib.import_module("published.scores")
    assert scores.ranks([10, 30, 10, 20]).tolist() == [1.5, 4, 1.5, 3]
    assert scores.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert scores.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert scores.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    assert math.isnan(scores.spearman([1, 1, 1], [1, 2, 3]))
    assert scores.regret([3, 1, 2], [10, 12, 11]) == pytest.approx(0.2)
    perfect = scores.ranking([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert (perfect.spearman, perfect.regret) == (pytest.approx(1), 0)
    assert perfect.ceiling > 0.999
    close = scores.ranking([1, 2, 3], [1.0, 1.001, 1.002])
    assert close.ceiling < 0.2
    assert close == scores.ranking([1, 2, 3], [1.0, 1.001, 1.002])
    errors = scores.relative_errors([1.1, 0.8, math.nan, 2.0], [1.0, 1.0, 1.0, math.nan])
    assert (errors.count, errors.mean_absolute, errors.mean) == (2, pytest.approx(0.15), pytest.approx(-0.05))


def test_a_file_that_is_no_table_is_refused_by_name(package: Any, tmp_path: Path) -> None:
    """Another header, or no file, is an error of the request and not a traceback."""
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(PlanError, match=r"other.csv must have the header of measured.csv"):
        package.read_rows(path)
    with pytest.raises(PlanError, match="readable"):
        package.read_rows(tmp_path / "none.csv")


def test_the_report_scores_garbage_and_good_rows_alike(tmp_path: Path) -> None:
    """One JSON object a row with the stated keys, null where nothing is known; a summary is printed."""
    path = written(
        tmp_path / "rows.csv",
        {**GOOD, "id": "good", "family": "mine", "trust": "A", "peak_mem_gib": 60},
        {**GOOD, "id": "unknown", "gpu": "Cerebras"},
        {"id": "empty"},
        {"id": "text", "notes": 'quoted "text", with\nnewline', "n_gpus": "many", "step_time_s": 1},
    )
    out = tmp_path / "out.json"
    done = run_script("--rows", str(path), "--json", str(out), "--errors", "1", script="accuracy.py")
    assert done.returncode == 0, done.stderr
    objects = json.loads(out.read_text())
    keys = ["id", "family", "trust", "skipped", "measured_step_seconds", "predicted_step_seconds"]
    assert all(list(one) == [*keys, "measured_peak_bytes", "predicted_peak_bytes"] for one in objects)
    assert [one["id"] for one in objects if one["skipped"] is None] == ["good"]
    assert objects[0]["measured_peak_bytes"] == 60 * 2**30
    assert objects[0]["predicted_step_seconds"] > 0
    assert objects[1]["predicted_step_seconds"] is None
    assert "Skipped: 3 of 4 rows" in done.stdout
    assert "tp-1" in done.stdout
    refused = run_script("--families", "nobody", script="accuracy.py")
    assert refused.returncode == 2
    assert "--families must name families" in refused.stderr
