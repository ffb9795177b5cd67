"""Draw the pictures of the README and of docs/concepts.md.

Run `python docs/picture.py`; what they show is computed by evenmoe, from loads that stand here or from its own small
synthetic trace, so anybody gets the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import evenmoe as em
from evenmoe.io.output import whole_file
from evenmoe.metrics import even_rank_loads
from evenmoe.placement import default_placement
from evenmoe.rules import RULES
from evenmoe.traces.synthesis import small_trace

RANKS, LAYER = 8, 0
WIDTH, HEIGHT, LEFT, BAR, GAP = 860, 300, 30, 34, 9
BASE, TOP = 240, 70  # of the bars, in pixels from above
MIDDLE = LEFT + WIDTH // 2  # where the right panel begins
RED, GREEN, GRAY = "#d1603d", "#2d7f7b", "#9aa4ae"
THREE = ("#9fd3c7", "#f2c38b", "#c3b5e8")  # of three replicas
EIGHT = [600, 300, 250, 250, 200, 200, 100, 100]  # tokens per expert, those of the README


def bars(
    x: int,
    title: str,
    note: str,
    loads: np.ndarray,
    scale: float,
    colour: str,
    what: str = "rank",
) -> list[str]:
    """One panel: a bar for each load, and a dashed line at their mean."""
    parts = [*heading(x, title, note)]
    for rank, load in enumerate(loads):
        height = load * scale
        left = x + rank * (BAR + GAP)
        parts.append(f'<rect x="{left}" y="{BASE - height:.1f}" width="{BAR}" height="{height:.1f}" fill="{colour}"/>')
        parts.append(f'<text x="{left + BAR / 2}" y="{BASE + 18}" class="tick">{rank}</text>')
    end = x + len(loads) * (BAR + GAP) - GAP
    parts += mean_line(x, end, BASE - loads.mean() * scale)
    parts.append(f'<text x="{(x + end) / 2}" y="{BASE + 40}" class="axis">{what}</text>')
    return parts


def heading(x: int, title: str, note: str) -> list[str]:
    return [f'<text x="{x}" y="34" class="title">{title}</text>', f'<text x="{x}" y="54" class="note">{note}</text>']


def mean_line(x: int, end: int, y: float) -> list[str]:
    return [
        f'<line x1="{x - 4}" x2="{end + 4}" y1="{y:.1f}" y2="{y:.1f}" class="mean"/>',
        f'<text x="{end + 8}" y="{y + 4:.1f}" class="note">mean</text>',
    ]


def picture(label: str, *panels: list[str]) -> bytes:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{label}">',
        "<style>text{font-family:system-ui,sans-serif;fill:#24292f}.title{font-size:17px;font-weight:600}"
        ".note,.tick,.axis{font-size:12px;fill:#57606a}.tick,.axis{text-anchor:middle}"
        ".mean{stroke:#24292f;stroke-dasharray:5 4}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
        *(part for panel in panels for part in panel),
        "</svg>",
    ]
    return ("\n".join(parts) + "\n").encode()


def loads_of_ranks() -> tuple[np.ndarray, np.ndarray]:
    """Rank loads of one layer before and after planning, (RANKS,) each."""
    trace = small_trace()
    load = trace.load.sum(axis=0)
    identity = default_placement(trace.num_layers, trace.num_experts, RANKS)
    planned = em.plan(load, num_ranks=RANKS, num_slots=trace.num_experts + RANKS)
    before, after = (even_rank_loads(load, placement)[LAYER] for placement in (identity, planned))
    return before, after


def ranks() -> bytes:
    """Rank loads of one layer before and after planning."""
    before, after = loads_of_ranks()
    scale = (BASE - TOP) / before.max()
    par = [float(loads.max() / loads.mean()) for loads in (before, after)]
    right = f"one more slot per rank: {par[1]:.3f} x the mean"
    return picture(
        "Tokens per rank before and after planning",
        bars(LEFT, "Default placement", f"busiest rank {par[0]:.2f} x the mean", before, scale, RED),
        bars(MIDDLE, "Planned", right, after, scale, GREEN),
    )


def text() -> str:
    """The same in characters, for the README, which is shown where no picture of a repository is."""
    before, after = (loads / loads.mean() for loads in loads_of_ranks())
    lines = [f"{'tokens per rank, times the mean':<41}planned, one more slot per rank"]
    for rank, (left, right) in enumerate(zip(before, after, strict=True)):
        lines.append(f"{rank}  {'█' * round(14 * left):<32}{left:.2f}  {'█' * round(14 * right):<16}{right:.2f}")
    return "\n".join(lines) + "\n"


def stacked(x: int, title: str, note: str, placement: em.Placement, scale: float) -> list[str]:
    """One panel: on each rank its slots' shares of the loads of their experts, whose numbers stand in them."""
    parts, experts = heading(x, title, note), placement.slot_to_expert[0].reshape(placement.num_ranks, -1)
    shares = np.array(EIGHT) / placement.num_replicas[0]
    for rank, held in enumerate(experts):
        left, y = x + rank * (BAR + 40), float(BASE)
        for expert in held:
            height = shares[expert] * scale
            y -= height
            colour = THREE[0] if placement.num_replicas[0, expert] > 1 else GRAY
            parts.append(
                f'<rect x="{left}" y="{y:.1f}" width="{BAR + 20}" height="{height:.1f}" fill="{colour}" stroke="#fff"/>'
            )
            parts.append(
                f'<text x="{left + BAR / 2 + 10}" y="{y + height / 2 + 4:.1f}" class="tick" '
                f'style="fill:#24292f;font-size:{min(12.0, height):.0f}px">{expert}</text>'
            )
        parts.append(f'<text x="{left + BAR / 2 + 10}" y="{BASE + 18}" class="tick">rank {rank}</text>')
    return parts + mean_line(x, x + placement.num_ranks * (BAR + 40) - 20, BASE - sum(EIGHT) / 4 * scale)


def placement() -> bytes:
    """The README's eight experts on four ranks, as a model is loaded and planned with one more slot a rank."""
    planned = em.plan([EIGHT], num_ranks=4, num_slots=12)
    default = default_placement(1, 8, 4)
    par = [float(em.peak_to_average([EIGHT], one)[0]) for one in (default, planned)]
    scale = (BASE - TOP) / 900
    return picture(
        "Eight experts on four ranks, in the default placement and planned",
        stacked(LEFT, "Default placement: 2 slots a rank", f"PAR {par[0]:.2f}", default, scale),
        stacked(MIDDLE, "Planned: 3 slots a rank", f"PAR {par[1]:.2f}; replicas are green", planned, scale),
    )


def rules() -> bytes:
    """Which of three replicas serves each token, for four ranks that each send four tokens to one expert."""
    import torch

    table = torch.tensor([[3, 0, 1, 2]], dtype=torch.int32)
    panels = []
    for column, name in enumerate(("rank", "token", "occurrence")):
        x = LEFT + column * 275
        rule, ids = RULES.get(name), torch.zeros(4, 1, dtype=torch.int32)
        chosen = np.array([rule.prepare(table, 3, rank, 4)(ids).flatten().tolist() for rank in range(4)])
        counts = " / ".join(str(int((chosen == slot).sum())) for slot in range(3))
        parts = heading(x, f"rule {name}", f"tokens of replica 0 / 1 / 2: {counts}")
        for rank, row in enumerate(chosen):
            y = TOP + rank * 40
            parts.append(f'<text x="{x}" y="{y + 22}" class="note">rank {rank}</text>')
            for token, slot in enumerate(row):
                left = x + 50 + token * 40
                parts.append(f'<rect x="{left}" y="{y}" width="34" height="34" rx="4" fill="{THREE[slot]}"/>')
                parts.append(f'<text x="{left + 17}" y="{y + 22}" class="tick" style="fill:#24292f">{slot}</text>')
        parts.append(f'<text x="{x + 127}" y="{TOP + 178}" class="axis">token of the rank: 0, 1, 2, 3</text>')
        panels.append(parts)
    return picture("Which replica each rule chooses", *panels)


def windows() -> bytes:
    """PAR of windows that a plan has seen, and of the next ones."""
    trace = em.synthesize("deepseek-v3", num_windows=16, num_layers=1)
    seen, unseen = trace.load[:8], trace.load[8:]
    planned = em.plan(seen, num_ranks=32, num_slots=288)
    par = [np.array([em.peak_to_average(one, planned)[0] for one in part]) for part in (seen, unseen)]
    scale = (BASE - TOP) / max(one.max() for one in par)
    notes = [f"mean PAR {one.mean():.3f}" for one in par]
    return picture(
        "PAR of windows that a plan was made from, and of unseen windows",
        bars(LEFT, "Windows that were planned on", notes[0], par[0], scale, GRAY, "window"),
        bars(MIDDLE, "Windows that no plan has seen", notes[1], par[1], scale, GREEN, "window"),
    )


def split() -> bytes:
    """Rank loads of a batch that is unlike the load it was planned for: even shares, and the best split."""
    planned = em.plan([EIGHT], num_ranks=4, num_slots=12)
    batch = np.array([[300, 500, 150, 350, 300, 100, 200, 100]])
    even = even_rank_loads(batch, planned)[0]
    best = em.split_batch(batch, planned.slot_to_expert, num_ranks=4).reshape(4, -1).sum(axis=1)
    scale = (BASE - TOP) / max(even.max(), best.max())
    return picture(
        "Rank loads of one batch, by even shares and by the best split",
        bars(LEFT, "Even shares", f"PAR {even.max() / even.mean():.3f}", even, scale, RED),
        bars(MIDDLE, "Best split (rule batch)", f"PAR {best.max() / best.mean():.3f}", best, scale, GREEN),
    )


def main() -> None:
    for draw in (ranks, placement, rules, windows, split):
        with whole_file(Path(__file__).with_name(f"{draw.__name__}.svg")) as file:
            file.write(draw())


if __name__ == "__main__":
    main()
