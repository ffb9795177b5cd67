"""Replay a trace under placements and rules, without a GPU."""
