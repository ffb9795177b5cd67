"""Routing traces: load and synthesise."""
