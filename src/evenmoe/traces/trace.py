"""`Trace`: recorded routing, and the npz file that holds it.

The file is a numpy .npz without pickled objects:
    load      integers (T, L, E), tokens per window, layer and expert; or (L, E) for one window. Required.
    routing   integers (tokens, L, K), the K distinct experts of every token. Optional.
    seq_start integers (requests + 1,), where each request's tokens begin in `routing`. Optional.
Other arrays are left alone.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evenmoe.errors import FileFormatError

_LARGEST_BYTES = 1 << 32  # of an array as int64, 4 GiB: a hundred times the largest trace that we know of
_MOST_TOKENS = 1 << 62  # in a file, so that no sum overflows


@dataclass(frozen=True)
class Trace:
    """Routing of one model, as recorded or made up.

    Attributes:
        name: where it comes from, for titles.
        load: int64 (T, L, E), tokens per window, layer and expert.
        routing: int64 (tokens, L, K), the experts that every token chose in every layer, or None.
    """

    name: str
    load: npt.NDArray[np.int64]
    routing: npt.NDArray[np.int64] | None = None

    @property
    def num_layers(self) -> int:
        return self.load.shape[1]

    @property
    def num_experts(self) -> int:
        return self.load.shape[2]


def load_trace(path: str | Path) -> Trace:
    """Read a trace file.

    Raises:
        FileFormatError: the file cannot be read, is not an .npz, or its arrays are not those of a trace; the message
            names the file, the array and the rule.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise _refuse(path, f"not readable ({error.strerror})", "must be an existing file", "check the path") from error
    with file:
        try:
            with zipfile.ZipFile(file) as archive:
                load, routing = _read(archive, path, "load"), _read(archive, path, "routing")
                names = ", ".join(sorted(name.removesuffix(".npy") for name in archive.namelist())) or "nothing"
        except FileFormatError:
            raise
        except Exception as error:  # damaged bytes make zipfile, zlib and numpy's header parser raise eleven types
            reason = str(error) or type(error).__name__
            raise _refuse(
                path, f"not an intact .npz file ({reason})", "must be a numpy .npz", "write it with numpy.savez"
            ) from error
    if load is None:
        raise _refuse(path, f"a file of {names}", "must hold `load`", "record loads first")
    return Trace(path.stem, _check_load(path, load), None if routing is None else _check_routing(path, routing, load))


def _read(archive: zipfile.ZipFile, path: Path, name: str) -> npt.NDArray[np.integer] | None:
    if f"{name}.npy" not in archive.namelist():
        return None
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.kind not in "iu":
            raise _refuse(path, f"`{name}` of dtype {dtype}", "must hold integers", "convert it with .astype(np.int64)")
        # Before anything is allocated: a header may claim any size.
        count = int(np.prod(shape, dtype=object))
        if count * dtype.itemsize != info.file_size - stream.tell() or 8 * count > _LARGEST_BYTES:
            raise _refuse(
                path,
                f"`{name}` of shape {shape} in {info.file_size} bytes",
                f"must hold as many bytes as its shape says, and at most {_LARGEST_BYTES // 8} numbers",
                "write it again",
            )
        data = stream.read()
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _check_load(path: Path, load: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    if load.ndim == 2:
        load = load[None]
    if load.ndim != 3 or load.size == 0:
        raise _refuse(
            path,
            f"`load` of shape {load.shape}",
            "must be (windows, layers, experts), no axis empty",
            "record one row of experts per window and layer",
        )
    if load.min() < 0 or load.sum(dtype=np.float64) >= _MOST_TOKENS:
        raise _refuse(
            path,
            f"`load` with counts from {load.min()} to {load.max()}",
            "must hold token counts, not negative, fewer than 2**62 together",
            "check how it was recorded",
        )
    return load.astype(np.int64)


def _check_routing(
    path: Path, routing: npt.NDArray[np.integer], load: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64] | None:
    layers, experts = load.shape[-2:]
    if routing.ndim != 3 or routing.shape[1] != layers or routing.shape[2] < 1:
        raise _refuse(
            path, f"`routing` of shape {routing.shape}", f"must be (tokens, {layers}, k)", "record one row per token"
        )
    if routing.size and (routing.min() < 0 or routing.max() >= experts):
        raise _refuse(
            path,
            f"`routing` with ids from {routing.min()} to {routing.max()}",
            f"must hold experts, 0 to {experts - 1}",
            "record ids of the same model as `load`",
        )
    in_order = np.sort(routing, axis=2)
    twice = in_order[:, :, 1:] == in_order[:, :, :-1]
    if twice.any():
        token, layer, place = np.argwhere(twice)[0]
        raise _refuse(
            path,
            f"`routing` with expert {in_order[token, layer, place]} twice for token {token}, layer {layer}",
            "must hold distinct experts per token and layer",
            "record the top-k as the model chose them",
        )
    return routing.astype(np.int64) if len(routing) else None


def _refuse(path: Path, value: str, rule: str, fix: str) -> FileFormatError:
    return FileFormatError(str(path), value, rule, fix)
