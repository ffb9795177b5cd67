"""What a replay found as one HTML page and PNGs."""

from evenmoe.report.page import write_report

__all__ = ["write_report"]
