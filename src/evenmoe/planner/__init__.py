"""Loads in, `Placement` out."""
