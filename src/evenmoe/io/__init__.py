"""Bytes to disk: the one way in which evenmoe writes files and folders."""
