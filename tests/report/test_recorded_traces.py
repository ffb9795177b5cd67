"""Traces as recorded, replayed and reported: what the page says is what `evenmoe simulate --json` printed."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.beside import measured_names
from tests.cli.running import runner
from tests.report.parsed import parse, table
from tests.traces.synthetic import SYNTHETIC, trace_file

NAMES = measured_names(
    "gpt_oss_20b_mmlu_pro_and_other",
    "deepseek_v2_lite_esft_intent",
    "deepseek_v2_lite_esft_law",
    "deepseek_v2_lite_esft_summary",
)


@pytest.mark.parametrize("name", [*SYNTHETIC, *NAMES])
def test_a_recorded_trace(tmp_path, monkeypatch, capsys, name):
    trace = trace_file(name, tmp_path)
    evenmoe = runner(monkeypatch, capsys)
    replay, page = tmp_path / "replay.sim", tmp_path / "page.html"
    policies = ("-p", "greedy", "-p", "evenmoe:rule=batch", "-p", "oracle")
    world = ("--ranks", 8, "--nodes", 2, "--tokens-per-rank", 32, "--steps", 12, "--refresh", 4, "--workers", 1)
    done = evenmoe("simulate", trace, *world, *policies, "--out", replay, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert evenmoe("report", replay, "-o", page).code == 0
    root = parse(page.read_text(encoding="utf-8"))
    rows = table(root, "All policies on the same steps")
    costs = table(root, "Costs by the model in the settings")
    wire = table(root, "Token rows communicated")
    assert root.one("h1").text == said["trace"]
    for policy, row, cost, rows_sent in zip(said["policies"], rows, costs, wire, strict=True):
        even = policy["break_even_steps"]
        assert row[0].shown == policy["name"]
        assert row[1].value == policy["net_gain_percent"]
        assert row[2].value == policy["gain_percent"]
        assert row[3].value == policy["mean_par"]
        assert row[4].value == policy["worst_par"]
        assert row[5].value == policy["step_time_us"]
        assert cost[3].value == policy["copies"]
        assert cost[6].value == (float("inf") if even is None else even)
        assert cost[4].value == policy["refreshes"]
        assert cost[7].value == policy["memory_bytes_per_rank"]
        assert cost[8].value == policy["extra_memory_bytes_per_rank"]
        assert [cell.value for cell in rows_sent[1:5]] == [
            policy["rows_within_node"],
            policy["rows_between_nodes"],
            policy["deduplicated_rows_within_node"],
            policy["deduplicated_rows_between_nodes"],
        ]
    files = {row[0].shown: row[1].shown for row in table(root, "Files read")}
    assert files == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (trace, replay)}
    assert [pre.text.split()[1] for pre in root.all("pre")] == ["simulate", "report"]
