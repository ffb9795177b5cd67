"""One command a file: its options and help; what it runs is imported when it runs."""

from evenmoe.cli.commands import cann, demo

__all__ = ["cann", "demo"]
