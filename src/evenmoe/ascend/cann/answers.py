"""How a Python function answers a C one: with a status, a message where it is not 0, and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

from evenmoe.ascend.status import AclError, check_not_null

Result = int | str | Sequence[int | str] | None
Answer = tuple[int, str | None, Sequence[int | str]]


def answers(
    function: Callable[..., Result],
    out: str = "",
    *,
    internal: int,
    null: int,
    ready: Callable[[], None] = lambda: None,
) -> Callable[..., Answer]:
    """The function as C calls it.

    Args:
        out: the C name of a pointer to the result, which is the last argument and must not be null.
        internal, null: statuses for a mistake of ours, and for a null `out`.
        ready: raises what the function may not be called before.

    >>> answers(lambda number: 2 * number, "count", internal=4, null=2)(3, 0x1000)
    (0, None, (6,))
    >>> answers(lambda number: 2 * number, "count", internal=4, null=2)(3, 0)
    (2, '`count` is a null pointer: it must be given; pass the address of one.', ())
    """

    @wraps(function)
    def answer(*arguments: object) -> Answer:
        try:
            ready()
            if out:
                check_not_null(null, out, arguments[-1])
                arguments = arguments[:-1]
            results = function(*arguments)
        except AclError as error:
            return error.status, str(error), ()
        except Exception as error:  # a mistake of ours must not end the C program
            return internal, f"internal error: {type(error).__name__}: {error}", ()
        if results is None:
            return 0, None, ()
        return 0, None, (results,) if isinstance(results, int | str) else results

    return answer
