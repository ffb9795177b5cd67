"""One command a file: its options and help; what it runs is imported when it runs."""

from evenmoe.cli.commands import cann, check, convert, demo, diff, plan, report, simulate, synthesise

__all__ = ["cann", "check", "convert", "demo", "diff", "plan", "report", "simulate", "synthesise"]
