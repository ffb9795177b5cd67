"""The C side: headers, libraries that embed this Python, and the builder behind `evenmoe cann --out DIR`."""

from __future__ import annotations
