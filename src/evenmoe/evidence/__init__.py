"""What a recording can show, and what it cannot: parts to plan and to judge on, sampling noise, paired gains, verdicts.

`plan` and `simulate` claim a gain only by these rules; docs/evidence.md derives them. Pure numpy, and deterministic:
random numbers have fixed seeds. Symbols: T windows, L layers, E logical experts, G ranks.
"""

from __future__ import annotations

from evenmoe.evidence.hold_out import HeldOut, hold_out
from evenmoe.evidence.noise import Unevenness, balanced_par, unevenness
from evenmoe.evidence.paired import PairedGain, paired_gain, t_quantile
from evenmoe.evidence.verdict import Verdict, centered_on, judge, par_gain

__all__ = [
    "HeldOut",
    "PairedGain",
    "Unevenness",
    "Verdict",
    "balanced_par",
    "centered_on",
    "hold_out",
    "judge",
    "paired_gain",
    "par_gain",
    "t_quantile",
    "unevenness",
]
