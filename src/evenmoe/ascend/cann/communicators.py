"""`HcclComm`: groups of devices of this process, registered as any world's, so that the operators find them by name."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from evenmoe.ascend.cann import refusals
from evenmoe.ascend.cann.handles import Handles
from evenmoe.ascend.cann.refusals import null, refusal
from evenmoe.ascend.cann.runtime import NUM_DEVICES
from evenmoe.transport.local import LocalTransport, Rendezvous
from evenmoe.transport.transport import register, unregister

# A rank that never comes is reported by aclrtSynchronizeStreamWithTimeout; this bounds a wait without one.
_EXCHANGE_S = 600.0


@dataclass(eq=False)
class Communicator:
    """One device's end of a group."""

    device: int
    transport: LocalTransport


class Communicators:
    """All groups of the process."""

    def __init__(self) -> None:
        self.handles: Handles[Communicator] = Handles(
            3, "a communicator", "HcclCommInitAll", refusals.HCCL_PARA, refusals.HCCL_PTR
        )
        self._numbers = itertools.count()

    def create(self, devices: list[int]) -> list[int]:
        """One group; rank r is devices[r].

        Raises:
            AclError: no device, one twice, or one there is not (HCCL_E_PARA).
        """
        bad = [device for device in devices if not 0 <= device < NUM_DEVICES]
        if not devices or bad or len(set(devices)) < len(devices):
            rule = f"must be distinct devices, each 0 to {NUM_DEVICES - 1}, and at least one"
            raise refusal(refusals.HCCL_PARA, "devices", devices, rule, "list each device of the group once")
        rendezvous = Rendezvous(f"evenmoe_hccl_{next(self._numbers)}", len(devices), _EXCHANGE_S)
        handles = []
        for rank, device in enumerate(devices):
            transport = LocalTransport(rendezvous, rank)
            register(transport)
            handles.append(self.handles.add(Communicator(device, transport)))
        return handles

    def destroy(self, handle: int) -> None:
        """Close one device's end; a rank that still waits for it is told."""
        _close(self.handles.pop("comm", handle))

    def device_of(self, name: str, rank: int) -> int | None:
        """The device that holds a rank of a named group, None when no group of ours has that name."""
        for communicator in self.handles.values():
            if communicator.transport.name == name and communicator.transport.rank == rank:
                return communicator.device
        return None

    def finish(self) -> None:
        """Close all of them."""
        for communicator in self.handles.values():
            _close(communicator)
        self.handles.clear()


def check_given(argument: str, address: int | list[int] | None) -> None:
    """Refuses a null pointer with HCCL's code."""
    if address is None or address == 0:
        raise null(refusals.HCCL_PTR, argument)


def _close(communicator: Communicator) -> None:
    unregister(communicator.transport)
    communicator.transport.close()
