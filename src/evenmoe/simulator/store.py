"""A `Simulation` in a file, which `evenmoe report` reads.

The file is an uncompressed numpy .npz without pickled objects. `simulation` is UTF-8 JSON as uint8: the format's
version, and every field of `Simulation` that is no array. The arrays of policy p are named `p/field`, those of the
simulation by their field; a placement is `slots` and `order`, int32 (L, S). The same simulation gives the same bytes.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from evenmoe.errors import ConstraintError, FileFormatError, UnsupportedTypeError
from evenmoe.io.output import whole_file
from evenmoe.placement import Placement
from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.policy_result import Details, PolicyResult, Traffic
from evenmoe.simulator.result import Simulation

VERSION = 2
MOST = 1e100  # of a time or a ratio, so that no sum, square or quotient that is shown overflows
_MOST_COUNTED = 1 << 62
_MOST_JSON = 1 << 24  # bytes; a hundred policies need less than a hundredth

# Fields that are arrays: their dtype, and their axes by the letters of `result`. R is free.
_ARRAYS = {"tokens": ("<i8", "N"), "load": ("<i8", "LE")}
_POLICY_ARRAYS = {
    "par": ("<f8", "NL"),
    "rank_tokens": ("<i8", "LG"),
    "copies": ("<i8", "NL"),
    "refreshes": ("<i8", "R"),
    "step_time": ("<f8", "N"),
    "copy_time": ("<f8", "N"),
}
_TRAFFIC = {field.name: ("<i8", "N") for field in fields(Traffic)}
_DETAILS = {"rank_loads": ("<i8", "NLG"), "rows": ("<f8", "NL4")}
_PLACEMENT = {"slots": ("<i4", "LS"), "order": ("<i4", "LS")}


def save_simulation(simulation: Simulation, path: str | Path) -> None:
    """Write `simulation` to `path`, in the order of torch.save; a file there is replaced once the new one is complete.

    Raises:
        OSError: the file cannot be written; `filename` names it, and what was there has not changed.
    """
    arrays: dict[str, np.ndarray] = {name: getattr(simulation, name) for name in _ARRAYS}
    policies = []
    for number, policy in enumerate(simulation.policies):
        found = {name: getattr(policy, name) for name in _POLICY_ARRAYS}
        found |= {name: getattr(policy.traffic, name) for name in _TRAFFIC}
        if policy.details is not None:
            found |= {name: getattr(policy.details, name) for name in _DETAILS}
        for which in ("initial", "final"):
            placement: Placement = getattr(policy, which)
            found |= {f"{which}/slots": placement.slot_to_expert, f"{which}/order": placement.replica_index}
        arrays |= {f"{number}/{name}": array for name, array in found.items()}
        policies.append(
            {
                "name": policy.name,
                "description": policy.description,
                "rule": policy.rule,
                "memory_per_rank": policy.memory_per_rank,
                # JSON has no infinity: null is "never".
                "break_even_steps": policy.break_even_steps if math.isfinite(policy.break_even_steps) else None,
                "details": policy.details is not None,
                **({"own_of": policy.own_of} if policy.own_of else {}),
                **({} if policy.final.is_even else {"rank_sizes": policy.final.rank_sizes}),
            }
        )
    head = {
        "evenmoe_simulation": VERSION,
        "trace": simulation.trace,
        "settings": simulation.settings,
        "num_ranks": simulation.num_ranks,
        "num_nodes": simulation.num_nodes,
        "num_experts": simulation.num_experts,
        "top_k": simulation.top_k,
        "notes": simulation.notes,
        "empty_windows": simulation.empty_windows,
        "num_warmup_steps": simulation.num_warmup_steps,
        "num_judged_steps": simulation.num_judged_steps,
        "horizon_steps": simulation.horizon_steps,
        "copy_overlap": simulation.copy_overlap,
        "recorded_tokens": simulation.recorded_tokens,
        "recorded_windows": simulation.recorded_windows,
        "assignments_per_step": simulation.assignments_per_step,
        "recorded_assignments_per_step": simulation.recorded_assignments_per_step,
        "hardware": simulation.hardware,
        **({"first_plan": simulation.first_plan} if simulation.first_plan else {}),
        **({} if simulation.engine is None else {"engine": asdict(simulation.engine)}),
        "policies": policies,
    }
    # A file's name may hold bytes that are no text: escaped as JSON does, it is read back as it was.
    text = json.dumps(head, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
    with whole_file(path) as file:
        np.savez(file, allow_pickle=False, simulation=np.frombuffer(text, np.uint8), **arrays)


def load_simulation(path: str | Path) -> Simulation:
    """Read what `save_simulation` wrote.

    Raises:
        FileFormatError: the file cannot be read or is no simulation; the message names the array or the key.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise _refuse(path, f"not readable ({error.strerror})", "must be an existing file", "check the path") from error
    with file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read(archive, path)
        except FileFormatError:
            raise
        except Exception as error:  # damaged bytes make zipfile, json and numpy's header parser raise a dozen types
            reason = str(error) or type(error).__name__
            raise _refuse(path, f"not an intact simulation ({reason})", "must be one", _AGAIN) from error


_AGAIN = "write it with `evenmoe simulate --out`"


def _read(archive: zipfile.ZipFile, path: Path) -> Simulation:
    info = archive.NameToInfo.get("simulation.npy")
    if info is None or info.file_size > _MOST_JSON:
        raise _refuse(path, "a file without `simulation`", "must be a simulation", _AGAIN)
    head = json.loads(_array(archive, path, "simulation", "|u1", {}, "J").tobytes().decode())
    if not isinstance(head, dict) or head.get("evenmoe_simulation") != VERSION:
        raise _refuse(path, "of another version", f"must be version {VERSION}", _AGAIN)
    sizes = {
        "N": _shape(archive, path, "tokens", 1)[0],
        "L": _shape(archive, path, "load", 2)[0],
        "E": _whole(path, head, "num_experts"),
        "G": _whole(path, head, "num_ranks"),
        "4": 4,
    }
    policies = head.get("policies")
    if not isinstance(policies, list) or not policies or not all(isinstance(entry, dict) for entry in policies):
        raise _refuse(path, "`policies` without a policy", "must name at least one", _AGAIN)
    found = tuple(_policy(archive, path, number, entry, sizes) for number, entry in enumerate(policies))
    names = [policy.name for policy in found]
    if len(set(names)) < len(names):
        raise _refuse(path, f"with policies {names}", "must name each policy once", _AGAIN)
    warmup, judged = (_whole(path, head, f"num_{part}_steps", least=0) for part in ("warmup", "judged"))
    if warmup + judged > sizes["N"]:
        raise _refuse(path, f"with {warmup} + {judged} of {sizes['N']} steps", "must have all steps it names", _AGAIN)
    drawn_from = head.get("recorded_assignments_per_step")
    if not isinstance(drawn_from, int | float) or isinstance(drawn_from, bool) or not 0 <= drawn_from <= MOST:
        rule = f"must be a number, 0 to {MOST}"
        raise _refuse(path, f"with `recorded_assignments_per_step` {drawn_from!r}", rule, _AGAIN)
    return Simulation(
        trace=_text(path, head, "trace"),
        settings=tuple(tuple(row) for row in _rows(path, head, "settings")),  # pyright: ignore[reportArgumentType]
        num_ranks=sizes["G"],
        num_nodes=_whole(path, head, "num_nodes"),
        num_experts=sizes["E"],
        top_k=_whole(path, head, "top_k"),
        policies=found,
        notes=tuple(_texts(path, head, "notes")),
        empty_windows=_whole(path, head, "empty_windows", least=0),
        num_warmup_steps=warmup,
        num_judged_steps=judged,
        horizon_steps=_whole(path, head, "horizon_steps"),
        copy_overlap=head.get("copy_overlap") is True,
        recorded_tokens=_whole(path, head, "recorded_tokens", least=0),
        recorded_windows=_whole(path, head, "recorded_windows", least=0),
        assignments_per_step=_whole(path, head, "assignments_per_step", least=0),
        recorded_assignments_per_step=drawn_from,
        hardware=_text(path, head, "hardware"),
        first_plan=_whole(path, head, "first_plan") if "first_plan" in head else 0,
        engine=_engine(path, head["engine"]) if "engine" in head else None,
        **{name: _array(archive, path, name, dtype, sizes, axes) for name, (dtype, axes) in _ARRAYS.items()},
    )


def _policy(
    archive: zipfile.ZipFile, path: Path, number: int, entry: dict[str, object], sizes: dict[str, int]
) -> PolicyResult:
    def arrays(wanted: dict[str, tuple[str, str]], prefix: str = "") -> dict[str, np.ndarray]:
        sizes_here = dict(sizes)  # the slots may differ between policies
        return {
            name: _array(archive, path, f"{number}/{prefix}{name}", dtype, sizes_here, axes)
            for name, (dtype, axes) in wanted.items()
        }

    def placement(which: str) -> Placement:
        found = arrays(_PLACEMENT, f"{which}/")
        try:
            return Placement(
                found["slots"], sizes["G"], num_experts=sizes["E"], replica_index=found["order"],
                rank_sizes=entry.get("rank_sizes"),  # pyright: ignore[reportArgumentType] (Placement checks it)
            )  # fmt: skip
        except (ConstraintError, UnsupportedTypeError) as error:
            raise _refuse(
                path, f"with `{which}` of policy {number} wrong ({error})", "must hold placements", _AGAIN
            ) from error

    even = entry.get("break_even_steps")
    if not (even is None or (isinstance(even, int | float) and not isinstance(even, bool) and 0 <= even < math.inf)):
        raise _refuse(path, f"with `break_even_steps` {even!r} of policy {number}", "must be steps or null", _AGAIN)
    return PolicyResult(
        name=_text(path, entry, "name"),
        description=_text(path, entry, "description"),
        rule=_text(path, entry, "rule"),
        traffic=Traffic(**arrays(_TRAFFIC)),
        initial=placement("initial"),
        final=placement("final"),
        memory_per_rank=_whole(path, entry, "memory_per_rank", least=0),
        break_even_steps=math.inf if even is None else float(even),
        details=Details(**arrays(_DETAILS)) if entry.get("details") else None,
        own_of=_text(path, entry, "own_of") if "own_of" in entry else "",
        **arrays(_POLICY_ARRAYS),
    )


def _engine(path: Path, entry: object) -> EngineView:
    if not isinstance(entry, dict):
        raise _refuse(path, f"with `engine` {entry!r}", "must be an object", _AGAIN)
    texts = {key: _text(path, entry, key) for key in ("name", "version", "rule", "choice", "balancer", "pace")}
    return EngineView(
        rules=tuple(_texts(path, entry, "rules")),
        loads_file=entry.get("loads_file") is True,
        takes_plans=entry.get("takes_plans") is True,
        uneven=entry.get("uneven") is True,
        **texts,
    )


def _shape(archive: zipfile.ZipFile, path: Path, name: str, axes: int) -> tuple[int, ...]:
    """The shape that an array claims; `_array` checks that its bytes agree."""
    if f"{name}.npy" not in archive.NameToInfo:
        raise _refuse(path, f"without `{name}`", "must hold it", _AGAIN)
    with archive.open(f"{name}.npy") as stream:
        np.lib.format.read_magic(stream)
        shape = np.lib.format.read_array_header_1_0(stream)[0]
    if len(shape) != axes or 0 in shape:
        raise _refuse(path, f"`{name}` of shape {shape}", f"must have {axes} axes, none empty", _AGAIN)
    return shape


def _array(archive: zipfile.ZipFile, path: Path, name: str, dtype: str, sizes: dict[str, int], axes: str) -> np.ndarray:
    """One array; a letter of `axes` that `sizes` does not know is free, and known from then on."""
    info = archive.NameToInfo.get(f"{name}.npy")
    if info is None:
        raise _refuse(path, f"without `{name}`", "must hold it", _AGAIN)
    if info.compress_type != zipfile.ZIP_STORED:  # so that a small file cannot ask for much memory
        raise _refuse(path, f"`{name}` compressed", "must be stored uncompressed", _AGAIN)
    with archive.open(info) as stream:
        np.lib.format.read_magic(stream)
        shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
        if found.str != dtype or (fortran and len(shape) > 1):
            raise _refuse(path, f"`{name}` of dtype {found.str}", f"must be {dtype} in C order", _AGAIN)
        if len(shape) != len(axes) or any(
            sizes.get(axis, size) != size for axis, size in zip(axes, shape, strict=True)
        ):
            wanted = tuple(sizes.get(axis, axis) for axis in axes)
            raise _refuse(path, f"`{name}` of shape {shape}", f"must be {wanted}", _AGAIN)
        if int(np.prod(shape, dtype=object)) * found.itemsize != info.file_size - stream.tell():
            raise _refuse(path, f"`{name}` of shape {shape}", "must hold as many bytes as its shape says", _AGAIN)
        array = np.frombuffer(stream.read(), found).reshape(shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _refuse(path, f"`{name}` with a value that is not finite", "must hold finite numbers", _AGAIN)
    if array.size and array.min() < 0:
        raise _refuse(path, f"`{name}` with {array.min()}", "must not be negative", _AGAIN)
    if array.dtype.kind == "f" and array.max(initial=0.0) > MOST:
        raise _refuse(path, f"`{name}` with {array.max()}", f"must hold numbers up to {MOST}", _AGAIN)
    if array.dtype.kind == "i" and array.sum(dtype=np.float64) >= _MOST_COUNTED:
        raise _refuse(path, f"`{name}` with {array.max()}", "must hold counts, fewer than 2**62 together", _AGAIN)
    sizes.update(zip(axes, shape, strict=True))
    return array


def _text(path: Path, entry: dict[str, object], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise _refuse(path, f"with `{key}` {value!r}", "must be text", _AGAIN)
    return value


def _texts(path: Path, entry: dict[str, object], key: str) -> list[str]:
    value = entry.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _refuse(path, f"with `{key}` {value!r}", "must be a list of texts", _AGAIN)
    return value


def _rows(path: Path, head: dict[str, object], key: str) -> list[list[str]]:
    value = head.get(key)
    if not isinstance(value, list) or not all(
        isinstance(row, list) and len(row) == 3 and all(isinstance(text, str) for text in row) for row in value
    ):
        raise _refuse(path, f"with `{key}` {value!r}", "must be a list of (name, value, unit)", _AGAIN)
    return value


def _whole(path: Path, entry: dict[str, object], key: str, least: int = 1) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST_COUNTED:
        raise _refuse(path, f"with `{key}` {value!r}", f"must be a whole number, {least} or more, below 2**62", _AGAIN)
    return value


def _refuse(path: Path, value: str, rule: str, fix: str) -> FileFormatError:
    return FileFormatError(str(path), value, rule, fix)
