"""Draw docs/ranks.svg, the README's picture: rank loads of one layer before and after planning.

Run `python docs/picture.py`; the numbers come from evenmoe's own small synthetic trace, so anybody gets the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import evenmoe as em
from evenmoe.io.output import whole_file
from evenmoe.metrics import even_rank_loads
from evenmoe.placement import default_placement
from evenmoe.traces.synthesis import small_trace

RANKS, LAYER = 8, 0
WIDTH, HEIGHT, LEFT, BAR, GAP = 860, 300, 30, 34, 9
BASE, TOP = 240, 70  # of the bars, in pixels from above


def bars(x: int, title: str, note: str, loads: np.ndarray, scale: float, colour: str) -> list[str]:
    mean = loads.mean()
    parts = [
        f'<text x="{x}" y="34" class="title">{title}</text>',
        f'<text x="{x}" y="54" class="note">{note}</text>',
    ]
    for rank, load in enumerate(loads):
        height = load * scale
        left = x + rank * (BAR + GAP)
        parts.append(f'<rect x="{left}" y="{BASE - height:.1f}" width="{BAR}" height="{height:.1f}" fill="{colour}"/>')
        parts.append(f'<text x="{left + BAR / 2}" y="{BASE + 18}" class="tick">{rank}</text>')
    line = BASE - mean * scale
    end = x + len(loads) * (BAR + GAP) - GAP
    parts.append(f'<line x1="{x - 4}" x2="{end + 4}" y1="{line:.1f}" y2="{line:.1f}" class="mean"/>')
    parts.append(f'<text x="{end + 8}" y="{line + 4:.1f}" class="note">mean</text>')
    parts.append(f'<text x="{(x + end) / 2}" y="{BASE + 40}" class="axis">rank</text>')
    return parts


def main() -> None:
    trace = small_trace()
    load = trace.load.sum(axis=0)
    identity = default_placement(trace.num_layers, trace.num_experts, RANKS)
    planned = em.plan(load, num_ranks=RANKS, num_slots=trace.num_experts + RANKS)
    before, after = (even_rank_loads(load, placement)[LAYER] for placement in (identity, planned))
    scale = (BASE - TOP) / before.max()
    par = [float(em.peak_to_average(load, placement)[LAYER]) for placement in (identity, planned)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'role="img" aria-label="Tokens per rank before and after planning">',
        "<style>text{font-family:system-ui,sans-serif;fill:#24292f}.title{font-size:17px;font-weight:600}"
        ".note,.tick,.axis{font-size:12px;fill:#57606a}.tick,.axis{text-anchor:middle}"
        ".mean{stroke:#24292f;stroke-dasharray:5 4}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
        *bars(LEFT, "Default placement", f"busiest rank {par[0]:.2f} x the mean", before, scale, "#d1603d"),
        *bars(
            LEFT + WIDTH // 2, "Planned", f"one more slot per rank: {par[1]:.3f} x the mean", after, scale, "#2d7f7b"
        ),
        "</svg>",
    ]
    with whole_file(Path(__file__).with_name("ranks.svg")) as file:
        file.write(("\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    main()
