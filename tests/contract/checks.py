"""The checks of the contract as functions of a call's fields, by keyword."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from evenmoe.contract.calls import AddRmsNormCall, CombineCall, DispatchCall, UpdateExpertCall
from evenmoe.contract.combine import check_combine_call
from evenmoe.contract.dispatch import check_dispatch_call
from evenmoe.contract.update_expert import check_update_expert_call

#: Fields that are evenmoe's own, and that no check looks at.
BEYOND_THE_CHIP = ("check_values", "dispatch_number")


def takes(call_type: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    signature = inspect.signature(call_type)
    shown = [parameter for name, parameter in signature.parameters.items() if name not in BEYOND_THE_CHIP]

    def check_fields(*args: object, **kwargs: object) -> Any:
        return check(call_type(*args, **kwargs))

    setattr(check_fields, "__signature__", signature.replace(parameters=shown))  # noqa: B010
    return check_fields


check_update_expert = takes(UpdateExpertCall, check_update_expert_call)
check_dispatch = takes(DispatchCall, check_dispatch_call)
check_combine = takes(CombineCall, check_combine_call)
check_combine_add_rms_norm = takes(AddRmsNormCall, check_combine_call)
