"""The page's numbers, recomputed from the simulation with plain loops."""

from __future__ import annotations

import math
import statistics

import pytest

from evenmoe.report import write_report
from tests.report.parsed import parse, table
from tests.report.replays import make_replay

# Means of up to 60 × 6 doubles in another order of adding: 360 roundings of 2⁻⁵³ are 4e-14.
SAME = {"rel": 1e-13, "abs": 1e-13}


@pytest.fixture(scope="module")
def simulation():
    return make_replay(policies=("identity", "one", "two", "oracle"))


@pytest.fixture(scope="module")
def root(simulation, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_report(simulation, path, "evenmoe report replay.sim", {"replay.sim": "12" * 32})
    return parse(path.read_text(encoding="utf-8"))


def mean(values):
    return math.fsum(values) / len(values)


def copying(policy):
    """Of a step: the first copies spread over 3,000 steps, later ones over the 60 of the replay."""
    begun = policy.refreshes.tolist()
    first = float(policy.copy_time[begun[0]]) if begun else 0.0
    return first / 3000 + math.fsum(policy.copy_time[begun[1:]].tolist()) / 60


def all_pars(policy):
    return [float(value) for row in policy.par for value in row]


def assert_cells(cells, values, texts=None):
    assert [cell.value for cell in cells] == pytest.approx([float(value) for value in values], **SAME)
    if texts is not None:
        assert [cell.shown for cell in cells] == texts


def significant(value):
    """Three significant digits the slow way: as many decimals as leave three digits from the first that is not 0."""
    if value == 0:
        return "0"
    for decimals in range(-9, 9):
        rounded = round(value, decimals)
        if len(f"{abs(rounded) * 10.0**decimals:.0f}") >= 3:
            return f"{rounded:,.{max(decimals, 0)}f}".replace("-", "−")  # noqa: RUF001
    raise AssertionError(value)


def signed(value):
    text = f"{abs(value):,.1f}\u00a0%"
    return text if text == "0.0\u00a0%" else ("+" if value > 0 else "\u2212") + text


def test_all_policies(root, simulation):
    base = simulation.policies[0]
    for policy, row in zip(simulation.policies, table(root, "All policies on the same steps"), strict=True):
        step, base_step = mean(policy.step_time.tolist()), mean(base.step_time.tolist())
        gain = 100 * (1 - step / base_step)
        net = 100 * (1 - (step + copying(policy)) / base_step)
        extra = 100 * (policy.memory_per_rank - base.memory_per_rank) / base.memory_per_rank
        par, worst = mean(all_pars(policy)), max(all_pars(policy))
        assert row[0].shown == policy.name
        assert_cells(
            row[1:],
            (net, gain, par, worst, step, copying(policy), extra),
            [
                signed(net),
                signed(gain),
                f"{par:.3f}",
                f"{worst:.3f}",
                significant(step / 1000),  # the longest step takes milliseconds
                significant(copying(policy) / 1000),
                signed(extra),
            ],
        )


def best_of(simulation):
    """The policy that the headline is about."""
    return next(p for p in simulation.policies if p.name == simulation.summary.headline.policy)


def test_the_headline_is_that_of_the_simulation(root, simulation):
    said, best = simulation.summary.headline, best_of(simulation)
    lead = next(p for p in root.all("p") if p.attributes.get("class") == "lead").text
    assert lead == said.sentence
    assert [p.text for p in root.all("p") if p.attributes.get("class") == "also"] == list(said.details)
    assert said.measured_on in root.one("main").text
    cards = next(d for d in root.all("dl") if d.attributes.get("class") == "cards")
    shown = [float(data.attributes["value"]) for data in cards.all("data")]
    net = mean(best.step_time.tolist()) + copying(best)
    expected = [mean(all_pars(best)), max(all_pars(best)), net, best.copies.sum()]
    assert shown == pytest.approx([*expected, best.break_even_steps, best.memory_per_rank], **SAME)


def test_median_layers(root, simulation):
    rows = table(root, "PAR of the median layer, by step")
    for policy, row in zip(simulation.policies, rows, strict=True):
        medians = [statistics.median(layers.tolist()) for layers in policy.par]
        assert row[0].shown == policy.name
        assert_cells(row[1:], (medians[0], mean(medians), min(medians), max(medians), medians[-1]))


def test_loads_of_ranks(root, simulation):
    for when, policy in (("Before", simulation.policies[0]), ("After", best_of(simulation))):
        rows = table(root, f"Rows per rank, {when}: {policy.name}")
        for layer, (loads, row) in enumerate(zip(policy.rank_tokens.tolist(), rows, strict=True)):
            average = sum(loads) / len(loads)
            assert row[0].shown == str(layer)
            assert_cells(row[1:4], (min(loads), average, max(loads)))
            assert loads[int(row[4].shown)] == max(loads)
            assert_cells(row[5:], (max(loads) / average,), [f"{max(loads) / average:.3f}"])


def test_worst_layers(root, simulation):
    identity, best = simulation.policies[0], best_of(simulation)
    rows = table(root, "Layers with the highest mean PAR under identity")
    pars = [mean(layer.tolist()) for layer in identity.par.T]
    assert [int(row[0].shown) for row in rows] == sorted(range(6), key=lambda layer: -pars[layer])[:8]
    for row in rows:
        layer = int(row[0].shown)
        before, after = identity.par[:, layer].tolist(), best.par[:, layer].tolist()
        assert_cells(row[1:5], (mean(before), max(before), mean(after), max(after)))
        loads = simulation.load[layer].tolist()
        expert = int(row[5].shown)
        assert loads[expert] == max(loads)
        held = best.final.slot_to_expert[layer].tolist().count(expert)
        assert_cells(row[6:], (100 * max(loads) / sum(loads), held))


def test_replicas_of_the_worst_layer(root, simulation):
    pars = [mean(layer.tolist()) for layer in simulation.policies[0].par.T]
    layer = pars.index(max(pars))
    best = best_of(simulation).final
    slots, loads = best.slot_to_expert[layer].tolist(), simulation.load[layer].tolist()
    replicated = [expert for expert in range(32) if slots.count(expert) > 1]
    rows = table(root, f"Replicated experts of layer {layer}")
    assert [int(row[0].shown) for row in rows] == sorted(replicated, key=lambda e: -loads[e])[:24]
    for row in rows:
        expert = int(row[0].shown)
        ranks = sorted({slot // best.slots_per_rank for slot, held in enumerate(slots) if held == expert})
        assert_cells(row[1:3], (100 * loads[expert] / sum(loads), slots.count(expert)))
        assert row[3].shown == ", ".join(map(str, ranks))


def test_traffic(root, simulation):
    rows = table(root, "Token rows communicated")
    for policy, row in zip(simulation.policies, rows, strict=True):
        wire = policy.traffic
        kinds = (wire.within_node, wire.between_nodes, wire.within_node_once, wire.between_nodes_once)
        values = [mean(kind.tolist()) for kind in kinds]
        assert row[0].shown == policy.name
        assert_cells(row[1:], (*values, 100 * (1 - (values[2] + values[3]) / (values[0] + values[1]))))


def test_costs(root, simulation):
    base = simulation.policies[0].memory_per_rank
    for policy, row in zip(simulation.policies, table(root, "Costs by the model in the settings"), strict=True):
        copies, refreshes = int(policy.copies.sum()), len(policy.refreshes)
        expected = (
            mean(policy.step_time.tolist()) + copying(policy),
            math.fsum(policy.copy_time.tolist()),
            copies,
            refreshes,
            copies / refreshes if refreshes else 0,
            policy.break_even_steps,
            policy.memory_per_rank,
            policy.memory_per_rank - base,
        )
        assert row[0].shown == policy.name
        assert_cells(row[1:], expected)


def test_settings_command_and_inputs(root, simulation):
    rows = table(root, "Everything that was chosen")
    assert tuple(tuple(cell.shown for cell in row) for row in rows) == simulation.settings
    assert [pre.text for pre in root.all("pre")] == ["evenmoe report replay.sim"]
    assert [[cell.shown for cell in row] for row in table(root, "Files read")] == [["replay.sim", "12" * 32]]
    assert all(note in root.one("main").text for note in simulation.notes)


def test_the_replays_own_command_and_files_are_shown_with_the_pages(tmp_path):
    simulation = make_replay(steps=2)
    own = (("command", "evenmoe simulate a.npz --out replay.sim", ""), ("SHA-256 of a.npz", "34" * 32, ""))
    object.__setattr__(simulation, "settings", own + simulation.settings)
    write_report(simulation, tmp_path / "page.html", "evenmoe report replay.sim", {"replay.sim": "12" * 32})
    root = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [pre.text for pre in root.all("pre")] == [own[0][1], "evenmoe report replay.sim"]
    files = [[cell.shown for cell in row] for row in table(root, "Files read")]
    assert files == [["a.npz", "34" * 32], ["replay.sim", "12" * 32]]
    assert len(table(root, "Everything that was chosen")) == len(simulation.settings) - 2


def test_lines_and_cells_lie_where_the_numbers_say(root, simulation):
    """The drawn points, back through the axes: 0.1 px of 260 px and a tenth of a per cent of the steps."""
    chart = next(svg for svg in root.all("svg") if svg.attributes.get("aria-labelledby") == "par-t par-d")
    ticks = [t for t in chart.all("text") if t.attributes.get("class") == "tick end"]
    (bottom, low), (top, high) = ((float(t.attributes["y"]), float(t.text)) for t in (ticks[0], ticks[-1]))
    assert low == 1.0
    lines = [path for path in chart.all("path") if (path.attributes.get("class") or "").startswith("line")]
    said = simulation.summary.headline
    focus = ("identity", said.policy, said.engine_policy)
    drawn = sorted(simulation.policies, key=lambda policy: policy.name in focus)  # the others lie behind
    assert [("quiet" in line.attributes["class"]) for line in lines] == [p.name not in focus for p in drawn]
    for policy, line in zip(drawn, lines, strict=True):
        points = [tuple(map(float, point.split())) for point in line.attributes["d"][1:].split("L")]
        medians = [statistics.median(layers.tolist()) for layers in policy.par]
        assert len(points) == 60
        for step, ((x, y), median) in enumerate(zip(points, medians, strict=True)):
            assert x == pytest.approx(1000 * (step + 0.5) / 60, abs=0.051)
            shown = low + (bottom - y) / (bottom - top) * (high - low)
            assert shown == pytest.approx(median, abs=0.051 / 260 * (high - low) * 1.01)


def test_colours_of_the_map_follow_the_load(root, simulation):
    drawn = {}
    svg = next(svg for svg in root.all("svg") if svg.attributes.get("aria-labelledby") == "load-before-t load-before-d")
    for path in svg.all("path"):
        level = int(path.attributes["class"].removeprefix("cell h"))
        for run in path.attributes["d"][1:].split("M"):
            start, _, length = run.partition("h")
            column, row = start.split()
            for offset in range(int(length)):
                drawn[int(float(row)), int(column) + offset] = level
    edges = (0.5, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0)
    expected = {}
    for layer, loads in enumerate(simulation.policies[0].rank_tokens.tolist()):
        for rank, rows in enumerate(loads):
            expected[layer, rank] = sum(rows / (sum(loads) / len(loads)) >= edge for edge in edges)
    assert drawn == expected
