"""PyTorch's .pt: the zip and its pickle are checked, then torch reads it with weights_only=True."""

from __future__ import annotations

import io
import warnings
import zipfile
from typing import Any

import numpy as np

from evenmoe.formats.containers.torch_pickle import PickleError, check_pickle
from evenmoe.formats.containers.zip_archive import open_zip

_DEEPEST = 16


class TorchFileError(ValueError):
    """What is wrong with the file."""


def parse_torch(data: bytes) -> Any:
    """Dictionaries, lists and scalars of the file; its tensors as numpy arrays. Raises `TorchFileError`."""
    _check(data)
    import torch  # not at the top: the other files need no torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates its own storages while it reads them
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever its C++ raises for records that the checks let through
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise TorchFileError(f"a file that torch refuses ({reason})") from None
    return _plain(value, torch.Tensor, {}, 0)


def _check(data: bytes) -> None:
    try:
        archive = open_zip(data)
    except ValueError as error:
        raise TorchFileError(str(error)) from None
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else None
    if root is None or not all(name.startswith(root) for name in entries):
        raise TorchFileError("a zip that is no file of torch.save: it has not one folder with one data.pkl")
    packed = next((e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise TorchFileError(f"a zip whose entry {packed[:60]!r} is compressed, which torch.save never does")
    try:
        pickle = archive.read(pickles[0])
    except Exception as error:  # a bad local header or checksum
        raise TorchFileError(f"a damaged zip ({str(error)[:80] or type(error).__name__})") from None

    def record_bytes(key: str) -> int | None:
        entry = entries.get(f"{root}data/{key}")
        return None if entry is None else entry.file_size

    try:
        check_pickle(pickle, record_bytes, len(data))
    except PickleError as error:
        raise TorchFileError(f"a pickle with {error}") from None


def _plain(value: Any, tensor: type, seen: dict[int, Any], depth: int) -> Any:
    """The value with arrays for tensors; `seen` keeps what is shared shared, so that no reference can multiply it."""
    if depth > _DEEPEST:
        raise TorchFileError(f"values nested more than {_DEEPEST} levels deep")
    if id(value) in seen:
        if seen[id(value)] is None:
            raise TorchFileError("a list or dictionary that holds itself")
        return seen[id(value)]
    if isinstance(value, tensor):
        seen[id(value)] = _array(value)
    elif isinstance(value, dict):
        seen[id(value)] = None
        seen[id(value)] = {key: _plain(item, tensor, seen, depth + 1) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        seen[id(value)] = None
        seen[id(value)] = [_plain(item, tensor, seen, depth + 1) for item in value]
    elif value is None or isinstance(value, (bool, int, float, str)):
        return value
    else:
        raise TorchFileError(f"a value of type {type(value).__name__}, which none of these files needs")
    return seen[id(value)]


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has none; float32 holds each of its values
        tensor = tensor.float()
    return tensor.numpy()


def torch_bytes(value: Any) -> bytes:
    """What `torch.save` writes for `value`, whose numpy arrays become tensors."""
    import torch

    buffer = io.BytesIO()
    torch.save(_tensors(value, torch.from_numpy), buffer)
    return buffer.getvalue()


def _tensors(value: Any, convert: Any) -> Any:
    if isinstance(value, np.ndarray):
        return convert(np.array(value, order="C"))
    if isinstance(value, dict):
        return {key: _tensors(item, convert) for key, item in value.items()}
    if isinstance(value, list):
        return [_tensors(item, convert) for item in value]
    return value
