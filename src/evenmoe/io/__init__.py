"""Files as bytes: what evenmoe writes is whole or not there, and nothing that it reads is trusted.

The readers here run no code of a file and allocate nothing on its word; they know nothing of placements or loads.
"""

from typing import Any

#: What a parsed file holds: arrays, lists, dictionaries, text, numbers, truth values, None. Whoever takes it looks.
Value = Any

#: Beyond 10 × its size, what reading a file may take: room for small files' fixed costs. Every reader's budget.
ALLOWANCE_BYTES = 8 << 20


class DamagedFileError(ValueError):
    """What is wrong with the bytes of a file, and where."""
