"""YAML within a memory budget, from libyaml's events: no objects but the values, and no aliases, which can explode."""

from __future__ import annotations

import re
from array import array

import numpy as np
import yaml

from evenmoe.io import ALLOWANCE_BYTES, DamagedFileError, Value
from evenmoe.io.text import Rows

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})")
_REAL = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_DEEPEST = 8
_LARGEST_BYTES = 4 << 20  # libyaml makes 300,000 events a second; 61 layers of 320 slots take 100 kB


def parse_yaml(data: bytes) -> Value:
    """One YAML document of plain values: mappings, lists, numbers, words. Raises `DamagedFileError`.

    >>> parse_yaml(b"num_slots: 2\\nlayers:\\n  3: [0, 1]\\n")
    {'num_slots': 2, 'layers': {3: array([0, 1])}}
    """
    if len(data) > _LARGEST_BYTES:
        raise DamagedFileError(f"{len(data)} bytes of YAML, more than {_LARGEST_BYTES}; JSON has no such limit")
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        return _Builder(len(data)).document(yaml.parse(data, Loader=loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise DamagedFileError(f"{error.problem}{where}") from None
    except yaml.YAMLError as error:  # ReaderError: bytes that are no text
        raise DamagedFileError(" ".join(str(error).split())[:120]) from None


class _Builder:
    def __init__(self, size: int) -> None:
        self.left = 8 * size + ALLOWANCE_BYTES

    def document(self, events: Value) -> Value:
        value: Value = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _wrong(event, "a second document")
            elif isinstance(event, yaml.NodeEvent):
                value = self.node(event, events, 0)
        return value

    def node(self, event: yaml.NodeEvent, events: Value, depth: int) -> Value:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _wrong(event, "an anchor or alias, which none of these files needs")
        if depth > _DEEPEST:
            raise _wrong(event, f"nested more than {_DEEPEST} levels deep")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if event.tag is not None:  # type: ignore[attr-defined]
            raise _wrong(event, "a tag, which none of these files needs")
        self.spend(event, 150)
        return (self.mapping if isinstance(event, yaml.MappingStartEvent) else self.sequence)(events, depth)

    def mapping(self, events: Value, depth: int) -> dict[Value, Value]:
        found: dict[Value, Value] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self.node(event, events, depth + 1)
            if isinstance(key, (dict, list, np.ndarray)) or key in found:
                raise _wrong(event, "a key that is a list or a mapping, or the same key twice")
            self.spend(event, 150)
            found[key] = self.node(next(events), events, depth + 1)
        return found

    def sequence(self, events: Value, depth: int) -> Value:
        whole = array("q")  # 8 bytes a number, where a list takes 36
        rows: Rows | None = None
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                self.spend(event, 150 * rows.apart() if rows else 0)
                break
            item = self.node(event, events, depth + 1)
            if rows is None and type(item) is int:
                whole.append(item)
                continue
            if rows is None:
                rows = Rows()
                for number in whole:
                    rows.append(number)
            self.spend(event, 48)
            rows.append(item)
            self.left += rows.released
        if rows is None:
            return np.array(whole, np.int64)
        value = rows.value()
        if isinstance(value, list) and all(type(item) in (int, float) for item in value):
            return np.array(value, np.float64)
        return value

    def scalar(self, event: yaml.ScalarEvent) -> Value:
        text = event.value
        if event.tag is not None:
            raise _wrong(event, "a tag, which none of these files needs")
        if event.implicit[0]:  # plain: not quoted
            if _INTEGER.fullmatch(text):
                value = int(text)
                if not -(2**63) <= value < 2**63:
                    raise _wrong(event, f"{text}, which does not fit 64 bits")
                return value
            if _REAL.fullmatch(text):
                value = float(text)
                if abs(value) == float("inf"):
                    raise _wrong(event, f"{text[:40]}, beyond float64's range")
                return value
            if text.lower() in _WORDS:
                return _WORDS[text.lower()]
        self.spend(event, 60 + 4 * len(text))
        return text

    def spend(self, event: yaml.Event, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _wrong(event, "more small values than a file of its size may hold in memory")


def _wrong(event: Value, what: str) -> DamagedFileError:
    mark = event.start_mark
    return DamagedFileError(f"{what}, line {mark.line + 1} column {mark.column + 1}")
