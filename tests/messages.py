"""Hypothesis strategies for wire messages that nobody would send: any message of a descriptor, with values at
the bounds and the names that a test knows to exist, and bytes that were a message before they were mutated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

Known = Mapping[str, tuple[str, ...]]
"""What a plausible field of this name holds."""

NUMBERS = (0, 1, 2, 3, 63, 64, 65, 1_000, 1_025, 65_535, 65_536, 2**31 - 1, 2**32 - 1, 2**53, 2**63 - 1)
FLOATS = (0.0, -1.0, 1.5, 1e300, -0.0, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "x", "../../etc/passwd", "\x00", "\x1b[2J", "{}", "[" * 3_000, "ab" * 32, "é" * 65, "x" * 70_000)
_SIGNED = {
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_SINT64,
    FieldDescriptor.TYPE_SFIXED64,
}
_NARROW = {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_FIXED32}


def _plausible(field: FieldDescriptor, known: Known) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=64)
        case FieldDescriptor.CPPTYPE_STRING:
            return st.sampled_from(known.get(field.name, ("x",)))
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.sampled_from([value.number for value in field.enum_type.values])
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return st.sampled_from((0.0, 1.5))
    return st.integers(1, 8)


def _wild(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=64) | st.just(b"\xff" * 1_100_000)
        case FieldDescriptor.CPPTYPE_STRING:
            return st.sampled_from(TEXTS) | st.text(max_size=12)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.integers(0, len(field.enum_type.values)) | st.just(2**31 - 1)
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return st.sampled_from(FLOATS)
    most = 2 ** (32 if field.type in _NARROW else 64) - 1
    if field.type in _SIGNED:
        return st.sampled_from([n for n in (*NUMBERS, -1, -(2**31)) if n <= most // 2])
    return st.sampled_from([n for n in (*NUMBERS, 2**64 - 1) if n <= most])


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, known: Known, depth: int = 3) -> Message:
    """A message of `kind`: most fields plausible, some wild, some not there."""
    values: dict[str, Any] = {}
    chosen = {
        oneof.name: draw(st.sampled_from([field.name for field in oneof.fields])) for oneof in kind.oneofs
    }
    for field in kind.fields:
        oneof = field.containing_oneof
        if oneof is not None and chosen[oneof.name] != field.name:
            continue
        whim = draw(st.integers(0, 29))
        if whim == 0:
            continue
        nested = field.message_type
        if nested is not None and depth == 0:
            continue
        if nested is not None and nested.GetOptions().map_entry:
            values[field.name] = draw(
                st.dictionaries(st.text(max_size=5), st.sampled_from(TEXTS[:5]), max_size=3)
            )
            continue
        if nested is not None:
            one = messages(nested, known, depth - 1)
        else:
            one = _wild(field) if whim == 1 else _plausible(field, known)
        if field.is_repeated:
            values[field.name] = draw(st.lists(one, max_size=3))
            if values[field.name] and whim == 2:
                values[field.name] = values[field.name][:1] * 20_000
        else:
            values[field.name] = draw(one)
    return GetMessageClass(kind)(**values)


@st.composite
def encoded(draw: st.DrawFn, kind: Descriptor, known: Known) -> bytes:
    """A message on the wire, in about half of all cases damaged on the way."""
    data = bytearray(draw(messages(kind, known)).SerializeToString())
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2, 5)))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("flip", "cut", "insert"))):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 9))]
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=6))
    return bytes(data)
