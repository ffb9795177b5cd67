"""Contrast of two colors as a browser gives them (WCAG 2.1, 1.4.3)."""

from __future__ import annotations

import re


def luminance(color: str) -> float:
    """WCAG's relative luminance of `rgb(…)`."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(front: str, behind: str) -> float:
    low, high = sorted((luminance(front), luminance(behind)))
    return (high + 0.05) / (low + 0.05)
