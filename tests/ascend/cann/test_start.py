"""What a C++ program waits for before its first call: the imports of the Python that it embeds."""

from __future__ import annotations

import subprocess
import sys

#: Hundreds of modules each, of which the operators on a CPU need nothing.
SPARED = ("torch._dynamo", "torch._inductor", "sympy", "pandas", "matplotlib")


def test_a_start_imports_none_of_the_compilers() -> None:
    """Of all operators: aclInit calls each kind once, so that nothing is imported under a time-out later."""
    script = f"""
import sys
from evenmoe.ascend.cann import bridge
print(bridge.init(), [name for name in {SPARED} if name in sys.modules])
before = set(sys.modules)
bridge._warm_up()
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "(0, None, ()) []\n[]\n"
