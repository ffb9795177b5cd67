"""PyTorch's .pt: the zip and what its pickle would build are checked, then torch reads it with weights_only=True.

`torch.load(weights_only=True)` runs no foreign code, but it believes sizes: a storage said to be larger than its record
is read past its end, a view said to be larger than its storage is allocated. Here every size is held against the zip.
"""

from __future__ import annotations

import io
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evenmoe.io import ALLOWANCE_BYTES, DamagedFileError, Value

_DEEPEST = 16
_ITEM_BYTES = {
    "torch DoubleStorage": 8,
    "torch LongStorage": 8,
    "torch FloatStorage": 4,
    "torch IntStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
}
_REBUILD, _ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_PARAMETER = "torch._utils _rebuild_parameter"  # (tensor, whether it requires gradients, hooks)
_LARGEST_BYTES = 32 << 20  # pickletools walks a million operations a second
_TENSOR_BYTES = 1500  # of Python and C++ objects for one tensor and its storage
_PUSHED_BYTES = {"EMPTY_DICT": 80, "EMPTY_LIST": 72, "EMPTY_TUPLE": 8, "NONE": 8, "NEWTRUE": 8, "NEWFALSE": 8}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE"}


def parse_torch(data: bytes, archive: zipfile.ZipFile) -> Value:
    """Dictionaries, lists and scalars of the file; its tensors as numpy arrays.

    Args:
        data: the file.
        archive: of the same bytes, its directory checked.

    Raises:
        DamagedFileError: naming what is wrong.
    """
    _check(archive, len(data))
    import torch  # not at the top: the other files need no torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates its own storages while it reads them
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever its C++ raises for records that the checks let through
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DamagedFileError(f"a file that torch refuses ({reason})") from None
    return _plain(value, torch.Tensor, {}, 0)


def _check(archive: zipfile.ZipFile, file_bytes: int) -> None:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else None
    if root is None or not all(name.startswith(root) for name in entries):
        raise DamagedFileError("a zip that is no file of torch.save: it has not one folder with one data.pkl")
    packed = next((e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise DamagedFileError(f"a zip whose entry {packed[:60]!r} is compressed, which torch.save never does")
    try:
        pickle = archive.read(pickles[0])
    except Exception as error:  # a bad local header or checksum
        raise DamagedFileError(f"a damaged zip ({str(error)[:80] or type(error).__name__})") from None

    def record_bytes(key: str) -> int | None:
        entry = entries.get(f"{root}data/{key}")
        return None if entry is None else entry.file_size

    _check_pickle(pickle, record_bytes, file_bytes)


def _plain(value: Value, tensor: type, seen: dict[int, Value], depth: int) -> Value:
    """The value with arrays for tensors; `seen` keeps what is shared shared, so that no reference can multiply it."""
    if depth > _DEEPEST:
        raise DamagedFileError(f"values nested more than {_DEEPEST} levels deep")
    if id(value) in seen:
        if seen[id(value)] is None:
            raise DamagedFileError("a list or dictionary that holds itself")
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
        raise DamagedFileError(f"a value of type {type(value).__name__}, which none of these files needs")
    return seen[id(value)]


def _array(tensor: Value) -> np.ndarray:
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has none; float32 holds each of its values
        tensor = tensor.float()
    return tensor.numpy()


def torch_bytes(value: Value) -> bytes:
    """What `torch.save` writes for `value`, whose numpy arrays become tensors."""
    import torch

    buffer = io.BytesIO()
    torch.save(_tensors(value, torch.from_numpy), buffer)
    return buffer.getvalue()


def _tensors(value: Value, convert: Value) -> Value:
    if isinstance(value, np.ndarray):
        return convert(np.array(value, order="C"))
    if isinstance(value, dict):
        return {key: _tensors(item, convert) for key, item in value.items()}
    if isinstance(value, list):
        return [_tensors(item, convert) for item in value]
    return value


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    count: int
    item_bytes: int


_MARK, _OPAQUE = object(), object()


def _check_pickle(data: bytes, record_bytes: Callable[[str], int | None], file_bytes: int) -> None:
    """Walk the pickle; `record_bytes(key)` is the size of a storage's record, None where there is none."""
    if len(data) > _LARGEST_BYTES:
        raise DamagedFileError(f"a pickle of {len(data)} bytes, more than {_LARGEST_BYTES}")
    walk = _Walk(record_bytes, 8 * file_bytes + ALLOWANCE_BYTES)
    try:
        for operation, argument, position in pickletools.genops(data):
            walk.position = position or 0
            walk.step(operation.name, argument)
    except DamagedFileError:
        raise
    except Exception as error:  # genops: ValueError, UnicodeDecodeError, …; an empty stack: IndexError
        raise DamagedFileError(f"a damaged pickle ({str(error)[:80] or type(error).__name__})") from None


class _Walk:
    def __init__(self, record_bytes: Callable[[str], int | None], budget: int) -> None:
        self.record_bytes, self.left, self.position = record_bytes, budget, 0
        self.stack: list[Value] = []
        self.memo: dict[int, Value] = {}

    def step(self, name: str, argument: Value) -> None:
        self.spend(16)
        if name in ("PROTO", "STOP", "FRAME"):
            return
        if name == "MARK":
            self.stack.append(_MARK)
        elif name in _PUSHED_BYTES:
            self.spend(_PUSHED_BYTES[name])
            self.stack.append(() if name == "EMPTY_TUPLE" else _OPAQUE)
        elif name in _NUMBERS or name in _TEXTS:
            self.spend(40 + (2 * len(argument) if isinstance(argument, str) else 0))
            self.stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.spend(100)
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self.known(argument))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = self.pop_marked() if name == "TUPLE" else self.pop(int(name[-1]))
            self.spend(56 + 8 * len(items))
            self.stack.append(tuple(items))
        elif name in ("APPEND", "SETITEM"):
            self.pop(1 if name == "APPEND" else 2)
            self.grow(64)
        elif name in ("APPENDS", "SETITEMS"):
            self.grow(64 * len(self.pop_marked()))
        elif name == "BINPERSID":
            self.stack.append(self.storage(self.stack.pop()))
        elif name == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(self.call(function, arguments))
        else:
            raise self.wrong(f"the operation {name}")

    def known(self, name: str) -> _Global:
        if name not in _ITEM_BYTES and name not in (_REBUILD, _ORDERED, _PARAMETER):
            raise self.wrong(f"the name `{name[:80]}`, which is code")
        return _Global(name)

    def storage(self, reference: Value) -> _Storage:
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise self.wrong("a reference that is no storage")
        _, kind, key, _, count = reference
        if not isinstance(kind, _Global) or kind.name not in _ITEM_BYTES or type(count) is not int or count < 0:
            raise self.wrong("a storage without a type or a size")
        item_bytes = _ITEM_BYTES[kind.name]
        stored = self.record_bytes(key) if isinstance(key, str) else None
        if stored != count * item_bytes:
            raise self.wrong(f"a storage {str(key)[:20]!r} of {count * item_bytes} bytes whose record has {stored}")
        return _Storage(count, item_bytes)

    def call(self, function: Value, arguments: Value) -> Value:
        if function == _Global(_ORDERED) and arguments == ():
            self.spend(150)
            return _OPAQUE
        if function == _Global(_PARAMETER) and arguments == (_OPAQUE,) * 3:
            self.spend(_TENSOR_BYTES)
            return _OPAQUE
        if function != _Global(_REBUILD) or not isinstance(arguments, tuple) or len(arguments) not in (6, 7):
            raise self.wrong("a call of something else than a tensor's making")
        storage, offset, shape, stride = arguments[:4]
        lengths = (*shape, *stride, offset) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in lengths):
            raise self.wrong("a tensor without a storage, a shape or strides")
        if len(shape) != len(stride) or len(shape) > 8:
            raise self.wrong(f"a tensor of {len(shape)} dimensions and {len(stride)} strides")
        count = 1
        for length in shape:
            count *= length
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if count and last >= storage.count:
            raise self.wrong(f"a tensor of shape {shape} that reaches {last} in a storage of {storage.count}")
        if count > storage.count:  # an expanded view: as large as it says once it is an array
            self.spend(count * storage.item_bytes)
        self.spend(_TENSOR_BYTES)
        return _OPAQUE

    def pop(self, count: int) -> list[Value]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise self.wrong("a stack that is too short")
        del self.stack[-count:]
        return items

    def pop_marked(self) -> list[Value]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def grow(self, count: int) -> None:
        if not self.stack or self.stack[-1] is not _OPAQUE:
            raise self.wrong("items for something that is no list and no dictionary")
        self.spend(count)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise self.wrong("more than a file of its size may hold in memory")

    def wrong(self, what: str) -> DamagedFileError:
        return DamagedFileError(f"a pickle with {what}, at byte {self.position} of its pickle")
