# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The inert unpickler: plain data as the standard one reads it, everything else named and never touched."""

import argparse
import collections
import contextlib
import copyreg
import dataclasses
import datetime
import enum
import pickle
import struct
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.inert_pickle import _SCANNED as SCANNED
from conversion.checkpoint.inert_pickle import MAX_DEPTH, Inert, Rebuild, Record, load
from tests.fixtures.hostile_pickles import EXTENSION_CODE, Reduced, harm_done, hostile_pickles, text, undo_harm
from tests.fixtures.yardstick import TWO_SECONDS, counted

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
)
keys = st.one_of(st.text(), st.integers(-(2**60), 2**60), st.tuples(st.text(), st.integers(0, 9)))
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(keys, inner, max_size=5),
        st.dictionaries(keys, inner, max_size=5).map(collections.OrderedDict),
        st.sets(keys, max_size=5),
        st.frozensets(keys, max_size=5),
    ),
    max_leaves=20,
)


@given(trees, st.sampled_from([4, 5]))
def test_plain_data_is_what_the_standard_unpickler_reads(tree, protocol):
    data = pickle.dumps(tree, protocol)
    assert load(data, "data") == pickle.loads(data)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol):
    shared = ["shared", 2**70, -1.5, True, None, 300, 70000]
    tree = {"a": [shared, shared], "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "c": collections.OrderedDict(x=1)}
    read = load(pickle.dumps(tree, protocol), "data")
    assert read == tree
    assert read["a"][0] is read["a"][1]


def test_bytearrays():
    assert load(pickle.dumps(bytearray(b"x"), 5), "data") == bytearray(b"x")


class ModelType(enum.Enum):
    encoder_or_decoder = 1


class Slotted:
    __slots__ = ("x",)


def slotted():
    value = Slotted()
    value.x = 5
    return value


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    ("value", "name", "content"),
    [
        (argparse.Namespace(num_layers=3, swiglu=True), "argparse.Namespace", {"num_layers": 3, "swiglu": True}),
        (types.SimpleNamespace(module="m", name="n"), "types.SimpleNamespace", {"module": "m", "name": "n"}),
        (slotted(), f"{__name__}.Slotted", {"x": 5}),
    ],
    ids=["namespace", "names_like_our_own", "slots"],
)
def test_the_state_of_an_object_is_its_vars(value, name, content, protocol):
    read = load(pickle.dumps(value, protocol), "data")
    assert type(read) is Inert
    assert read.qualified_name == name
    assert vars(read) == content


@pytest.mark.parametrize("protocol", range(2, 6))
def test_other_objects_keep_what_they_are_made_of(protocol):
    def read(value):
        return load(pickle.dumps(value, protocol), "data")

    assert repr(read(ModelType.encoder_or_decoder)) == "ModelType(1)"
    assert repr(read(ModelType)) == f"<{__name__}.ModelType>"
    assert read(datetime.date).args is None
    assert read(Path("a/b")).args == ("a", "b")
    assert read(collections.deque([1, 2])).items == [1, 2]
    assert read(collections.defaultdict(list, a=[1])).entries == [("a", [1])]
    assert read(Reduced(print, rest=([1, 2],))).state == [1, 2]
    keyed = read({ModelType.encoder_or_decoder: "value"})
    assert [(key.args, value) for key, value in keyed.items()] == [((1,), "value")]


def test_discarded_objects_are_gone():
    assert load(b"N(K\x0100(K\x01K\x021.", "data") is None


def test_known_names_become_the_callers_values():
    known = {("builtins", "print"): "seen", ("builtins", "max"): Rebuild(lambda args: sum(args))}
    data = pickle.dumps([print, Reduced(max, 1, 2), min], 4)
    seen, rebuilt, other = load(data, "data", known)
    assert (seen, rebuilt, other.qualified_name) == ("seen", 3, "builtins.min")


class Chunk:
    def __init__(self, **fields):
        vars(self).update(fields)


@dataclasses.dataclass(slots=True, eq=False)
class Kept:
    offsets: object = None
    length: object = None


RECORDS = {(__name__, "Chunk"): Record(Kept)}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_records_keep_the_fields_they_were_asked_for(protocol):
    chunk = Chunk(offsets=(1, 2), length=7, other={"deep": [[1]]})
    read = load(
        pickle.dumps({"a": [chunk, chunk], chunk: 1, "b": Chunk(offsets=["x", None])}, protocol), "data", RECORDS
    )
    first, second = read["a"]
    assert first is second
    assert read[first] == 1
    assert (type(first), first.offsets, first.length) == (Kept, (1, 2), 7)
    assert (read["b"].offsets, read["b"].length) == (("x", None), None)


@pytest.mark.parametrize("value", [[[1]], {"a": 1}, (1, (2,)), Chunk()], ids=["list", "dict", "tuple", "record"])
def test_fields_of_records_are_flat(value):
    with pytest.raises(CheckpointError, match="offsets of a Kept is no plain value"):
        load(pickle.dumps(Chunk(offsets=value)), "data", RECORDS)


@pytest.mark.parametrize("protocol", range(6))
def test_everything_that_is_recalled_was_kept(protocol):
    """More objects than one byte counts, recalled from near and far, beside many that never are."""
    shared = [[n] for n in range(1000)]
    tree = [shared, [str(n) for n in range(1000)], shared[::-1], shared[::7]]
    read = load(pickle.dumps(tree, protocol), "data")
    assert read == tree
    assert all(a is b for a, b in zip(read[0], reversed(read[2]), strict=True))


@pytest.mark.parametrize("size", [SCANNED - 3, SCANNED - 1, SCANNED, SCANNED + 1, SCANNED + 3])
def test_what_is_recalled_at_an_edge_of_what_is_looked_at_together(size):
    """The five bytes that recall object 300 lie over the edge or beside it."""
    head = b"\x80\x04" + b"]\x94" * 301 + b"("
    filler = b"\x8e" + struct.pack("<Q", size - len(head) - 9) + b"j" * (size - len(head) - 9)
    read = load(head + filler + b"j" + struct.pack("<I", 300) + b"K\x01at.", "data")
    assert read[1] == [1]


def test_persistent_ids_go_to_the_caller_alone():
    data = text("id") + b"Q."
    assert load(data, "data", persistent_load=str.upper) == "ID"
    with pytest.raises(CheckpointError, match="refers to objects outside of it"):
        load(data, "data")


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear, with everything hostile pickles need to make it appear."""
    copyreg.add_extension("os", "system", EXTENSION_CODE)
    undo_harm(tmp_path / "canary")
    yield tmp_path / "canary"
    undo_harm(tmp_path / "canary")
    copyreg.remove_extension("os", "system", EXTENSION_CODE)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", hostile_pickles(Path("canary")))
def test_hostile_pickles_do_nothing(name, protocol, canary):
    data = hostile_pickles(canary, protocol)[name]
    modules = set(sys.modules)
    try:
        repr(load(data, "data"))
    except CheckpointError as refusal:
        assert "nothing was executed" in str(refusal)  # noqa: PT017
    assert not harm_done(canary)
    assert set(sys.modules) == modules

    with contextlib.suppress(TypeError, AttributeError):  # some fail, after the harm
        pickle.loads(data)
    assert harm_done(canary), "the pickle is not hostile, or the canary is dead"


DEEP = 1_000_000
NAME = b"cmodule\nname\n"
COLLIDING = b"".join(b"\x8a\x0a" + ((2**61 - 1) * i + 2**72).to_bytes(10, "little") + b"N" for i in range(10**4))
BOMBS = {
    "deep lists": (b"]" * (DEEP // 2) + b"a" * (DEEP // 2 - 1) + b".", "nests deeper"),
    "fewer deep lists": (b"]" * (MAX_DEPTH + 1) + b"a" * MAX_DEPTH + b".", f"nests deeper than {MAX_DEPTH} levels"),
    "deep tuples": (b")" + b"\x85" * (DEEP // 2) + b".", "nests deeper"),
    "deep objects": (NAME + b"q\x00" + b"q\x010h\x00h\x01\x85R" * 3 * 10**4 + b".", "nests deeper"),
    "deep dicts": (b"K\x01" + b"q\x000}K\x01h\x00s" * 10**5 + b".", "nests deeper"),
    "deep in many short steps": (
        b"(]q\x00" + b"".join(b"]h" + bytes([i % 256]) + b"aq" + bytes([(i + 1) % 256]) for i in range(5000)) + b"l.",
        "nests deeper",
    ),
    "list in itself": (b"]q\x00h\x00a.", "contains itself"),
    "object in itself": (NAME + b")Rq\x00}" + text("x") + b"h\x00sb.", "contains itself"),
    "key of deep tuples": (b"}N" + b"\x85" * (DEEP // 2) + b"Ns.", "a tuple that no checkpoint needs is a key"),
    "key of exponential tuples": (b"}N" + b"2\x86" * 100 + b"Ns.", "a tuple that no checkpoint needs is a key"),
    "member of exponential tuples": (b"\x8f(N" + b"2\x86" * 100 + b"\x90.", "a tuple that no checkpoint needs"),
    "frozenset of exponential tuples": (b"(N" + b"2\x86" * 100 + b"\x91.", "a tuple that no checkpoint needs"),
    "colliding keys": (b"}(" + COLLIDING + b"u.", "a int that no checkpoint needs is a key"),
    "many tuple keys": (b"}(" + b"K\x01\x85N" * 20_000 + b"u.", "more than 10000 keys are tuples"),
    "key is a list": (b"}]Ns.", "a list that no checkpoint needs is a key"),
    "copies of a list": (
        b"(" + b"NN\x86" * 20_000 + b"lq\x00ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 10**4 + b".",
        "more (operations|memory) than",
    ),
    "copies of a state": (
        b"}(" + b"".join(text(str(i)) + b"N" for i in range(5000)) + b"uq\x00" + NAME + b"q\x01"
        + b"h\x01)Rh\x00b0" * 10**4 + b"N.",
        "more (operations|memory) than",
    ),
    "OrderedDict of no pairs": (b"ccollections\nOrderedDict\n]Na\x85R.", "from something else than pairs"),
    "OrderedDict of a string": (b"ccollections\nOrderedDict\n" + text("ab") + b"\x85R.", "than a list of pairs"),
    "many records": (b"cmodule\nrecord\n" + b"q\x00" + b"h\x00)R" * 10**6 + b".", "more (operations|memory) than"),
    "many dicts": (b"}" * 10**6 + b".", "more (operations|memory) than"),
    "state of a record": (b"c" + __name__.encode() + b"\nChunk\n)R]b.", "the state of a Kept is a list"),
    "opcode cut short": (b"M\x01", "ends inside of an opcode"),
    "short opcode in a short pickle": (b"jj\x00", "ends inside of an opcode"),
    "opcode cut to nothing": (b"h", "ends inside of an opcode"),
    "many objects": (NAME + b"q\x00" + b"h\x00)R" * 10**6 + b".", "more (operations|memory) than"),
    "bytes of 2^40": (b"\x8e" + struct.pack("<Q", 2**40) + b"x.", "expected 1099511627776 bytes"),
    "bytes of 2^63": (b"\x8e" + struct.pack("<Q", 2**63) + b"x.", "bytes"),
    "bytearray of 2^40": (b"\x96" + struct.pack("<Q", 2**40) + b"x.", "expected 1099511627776 bytes"),
    "string of 2^62": (b"\x8d" + struct.pack("<Q", 2**62) + b"x.", "bytes"),
    "integer of 2^31 bytes": (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "not enough data"),
    "integer of -1 bytes": (b"\x8b" + struct.pack("<i", -1) + b"x.", "byte count < 0"),
    "integer of 10^5 digits": (b"L" + b"9" * 10**5 + b"L\n.", "limit"),
    "memo number of 20 digits": (b"Np" + b"9" * 20 + b"\n.", "stores an object as number"),
    "memo never stored": (b"h\x05.", "recalls object 5, which it never stored"),
    "two numbers as a name": (b"K\x01K\x02\x93.", "names a global with a int and a int"),
    "call of a string": (text("os.system") + b")R.", "calls a str"),
    "arguments in a list": (NAME + b"]R.", "arguments are a list"),
    "state of a list": (b"]}b.", "sets the state of a list"),
    "item of a tuple": (b")NNs.", "sets items of a tuple"),
    "append to a dict": (b"}Na.", "appends to a dict"),
    "add to a list": (b"](N\x90.", "adds items to a list"),
    "key without value": (b"}(Nu.", "a key has no value"),
    "object of no class": (b"(o.", "object of no class"),
    "empty stack": (b".", "takes from an empty stack"),
    "tuple of too few": (b"N\x86.", "takes from an empty stack"),
    "no mark": (b"Nt.", "mark that is not there"),
    "persistent id as text": (b"Pid\n.", "no checkpoint needs opcode PERSID"),
    "extension": (b"\x83\x01\x00.", "no checkpoint needs opcode EXT2"),
    "buffer outside": (b"\x97.", "no checkpoint needs opcode NEXT_BUFFER"),
    "unknown opcode": (b"\xff.", "unknown"),
    "no end": (b"N", "before seeing STOP"),
    "nothing": (b"", "before seeing STOP"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_one_clean_line(data, message):
    with counted() as taken, pytest.raises(CheckpointError, match=message) as refusal:
        load(data, "weights.bin: data.pkl", {**RECORDS, ("module", "record"): Record(Kept)}, max_operations=4_000_000)
    assert str(refusal.value).startswith("weights.bin: data.pkl is damaged or hostile: ")
    assert len(str(refusal.value)) < 400
    assert taken.yardsticks < 5 * TWO_SECONDS


def test_what_many_things_share_is_visited_once():
    """A tree of 2^90 paths and 90 objects."""
    tree = load(b"N" + b"2\x86" * (MAX_DEPTH - 10) + b".", "data")
    assert tree[0] is tree[1]
    assert len(repr(load(NAME + b"N" + b"2\x86" * 90 + b"\x85R.", "data"))) < 100


def test_a_state_that_two_objects_have_is_visited_once():
    """2^60 paths: each state has two objects, and both of these the state before it."""
    twice = b"".join(text(name) + b"h\x00)Rh\x01bs" for name in "xy")
    data = NAME + b"q\x000}q\x010" + (b"}" + twice + b"q\x010") * 60 + b"h\x01."
    tree = load(data, "data")
    assert vars(tree["x"])["y"] is vars(tree["y"])["y"]


VALID = pickle.dumps({"args": argparse.Namespace(a=1, b=[2.5, "x"]), "e": ModelType.encoder_or_decoder, "s": {1, 2}}, 2)


@pytest.mark.filterwarnings("error")
@settings(max_examples=500, deadline=1000)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)
)
def test_mutations_are_read_or_refused(splices):
    data = VALID
    for start, dropped, inserted in splices:
        data = data[:start] + inserted + data[start + dropped :]
    with contextlib.suppress(CheckpointError):
        repr(load(data, "data"))
