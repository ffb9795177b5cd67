"""Should balancing be switched on, here, with how many copies, in which phase? Answered with times of modeled steps.

A plan is made on one part of a recording and judged on the other (`evenmoe.evidence`), in microseconds of the MoE
layers by `evenmoe.costs`. docs/advise.md says how, and when not to believe it.
"""

from __future__ import annotations

from evenmoe.advice.advise import Advice, Trial, advise

__all__ = ["Advice", "Trial", "advise"]
