"""The table of `ElasticBuffer`: each rank writes a part of it, and reads any entry (specification §16).

On the chip an entry is read from the other rank's memory when it is fetched. Here all parts are exchanged when they are
written, so that fetching needs no other rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from evenmoe.contract.tensor_spec import check_dims, check_dtype
from evenmoe.errors import ConstraintError, require
from evenmoe.ops.operator import check_tensors, spec_of
from evenmoe.transport.agreement import Header, dtype_code
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.packets import Outgoing
from evenmoe.transport.transport import Transport

TABLE_DTYPES = ("bfloat16", "float16", "float32")


class Table:
    """All ranks' parts, one after the other.

    Args:
        entries: (W · n, hidden), rank by rank.
    """

    def __init__(self, entries: torch.Tensor) -> None:
        self._entries, self._waiting = entries, False

    def fetch(self, indices: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A function that returns the entries at int32 (n,) indices; rows of those out of range are zero."""
        check_tensors(indices=indices)
        check_dims("indices", spec_of(indices), (1,), "(entries,)")
        check_dtype("indices", spec_of(indices), ("int32",))
        if self._waiting:
            rule, fix = "must come after the function of the fetch before was called", "call that function first"
            raise ConstraintError("engram_fetch", "called while another fetch is pending", rule, fix)
        self._waiting = True
        wanted = indices.long()
        inside = (wanted >= 0) & (wanted < len(self._entries))
        fetched = self._entries.new_zeros((len(wanted), self._entries.shape[1]))
        fetched[inside] = self._entries[wanted[inside]]

        def wait() -> torch.Tensor:
            self._waiting = False
            return fetched

        return wait


def write(transport: Transport, storage: torch.Tensor, room: int) -> Table:
    """Exchange this rank's part of the table for those of all ranks; a collective.

    Args:
        storage: float (n, hidden), equal in shape and dtype on all ranks. room: bytes that it may have.
    """
    with together(part := GroupCall(transport, "ElasticBuffer.engram_write", storage)):
        check_tensors(storage=storage)
        check_dims("storage", spec_of(storage), (2,), "(entries, hidden)")
        check_table_dtype("storage", spec_of(storage).dtype)
        entries, hidden = storage.shape
        rule = "must have a positive multiple of 128 columns"
        require(hidden > 0 and hidden % 128 == 0, "storage", f"of width {hidden}", rule, "pad its rows")
        rule = "must be contiguous"
        require(storage.is_contiguous(), "storage", "strided", rule, "call contiguous()")
        size, rule = storage.numel() * storage.element_size(), f"must fit into num_cpu_bytes {room}"
        require(size <= room, "storage", f"of {size} bytes", rule, "use get_engram_storage_size_hint")
        total, rule = entries * transport.world_size, "must have entries that int32 can number"
        require(total < 2**31, "storage", f"of {total} entries on all ranks", rule, "use fewer entries")
        sizes = {
            "entries of `storage`": entries,
            "hidden size of `storage`": hidden,
            "dtype of `storage`": dtype_code(storage.dtype),
        }
        world_size = transport.world_size
        outgoing = Outgoing([0] * world_size, [entries] * world_size, (hidden,), storage)
        nothing = torch.zeros((world_size, 0), dtype=torch.int64)
        header, index = Header("ElasticBuffer.engram_write", sizes), torch.arange(entries).repeat(world_size)
        _, incoming = part.send(header, nothing, outgoing, storage, index)
        return Table(incoming.take())


def check_table_dtype(argument: str, dtype: str) -> None:
    rule = "must be bfloat16, float16 or float32"
    require(dtype in TABLE_DTYPES, argument, dtype, rule, "convert the table to one of them")
