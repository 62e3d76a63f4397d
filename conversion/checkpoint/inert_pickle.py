# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reading a pickle without running it.

A pickle is a program, and an unpickler the interpreter that runs it. Subclassing `pickle.Unpickler` replaces only the
lookup of globals: REDUCE, NEWOBJ, INST, OBJ and BUILD still call what lies on the stack, or its `__setstate__`,
`append` and `extend`, and the extension registry stays open. Each of those doors would have to be closed by hand, in C
code that cannot be overridden or in its private Python twin, and again in every later version. So neither is used:
the opcodes are split with the tables of `pickletools`, which decode and run nothing, and the machine below gives each
of them a meaning in which nothing from the file is called or imported:

    a global name           `known[module, name]`, a value of the caller's, or an `Inert` that keeps the name
    calling an `Inert`      another `Inert`, which keeps the arguments
    calling a `Rebuild`     the one thing that runs: the caller's own function, written for untrusted arguments
    calling a `Record`      an object of the caller's own class, with the flat fields it asked for
    state, items, entries   kept in the `Inert`

Bounded, too: the operations, the memory of everything that is made or copied, the nesting, and what may be hashed (the
hash of nested tuples takes exponential time or all of the C stack, a dict of colliding keys quadratic time).
"""

import io
import itertools
import pickletools
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import CheckpointError

# A file with 50,000 tensors stays below both, and these below 100 MiB and a second.
MAX_OPERATIONS = 4_000_000
MAX_MEMORY = 56 * 2**20
MAX_DEPTH = 100
_MAX_ERROR = 300
# Bytes in memory, measured: an object with its state, lists and dict; a record; a dict; a tuple; a member of a dict
# that grows; a number of the memo, and what is known of an object that has one; an integer; a place on the stack.
_OBJECT_BYTES, _RECORD_BYTES, _DICT_BYTES, _TUPLE_BYTES = 400, 100, 72, 72
_MEMBER_BYTES, _MEMO_BYTES, _INTEGER_BYTES, _STACK_BYTES = 100, 200, 40, 16
_PERSISTENT_BYTES = 200  # as many as take the rest of the pickle as much time

# Keys whose hashes cost little and cannot be made to collide: by Python's random seed, by identity, or, for integers
# below the modulus of their hash, by being equal. There may be few of any others.
_MAX_INTEGER_KEY = 2**61 - 1
# Whoever makes a float of an integer may take it for granted that there is one: the largest float has 1024 bits.
_MAX_INTEGER_BITS = 1023
_MAX_OTHER_KEYS = 10_000
_MAX_KEY_ITEMS = 16

Known = Mapping[tuple[str, str], Any]


class Inert:
    """Stands for a class, a function or an object that a pickle names; does nothing.

    `vars(inert)` is the object's state where that is a dict, as it is of argparse.Namespace; attribute access works
    except for the names below.

    Args:
        module, name: the global the pickle names.
        args: what it is called with; None for the class or function itself.

    Attributes:
        state: the object's state, where that is not a dict.
        items: what was appended to it, as to a deque.
        entries: key and value pairs that were set in it, as in a defaultdict.
    """

    __slots__ = ("__dict__", "__weakref__", "args", "entries", "items", "module", "name", "state")

    def __init__(self, module: str, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.module = module
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []
        self.entries: list[tuple[Any, Any]] = []

    @property
    def qualified_name(self) -> str:
        """`module.name`."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        # Never the repr of what it holds: that may refer to itself, or to one thing in exponentially many ways.
        if self.args is None:
            return f"<{self.qualified_name[:80]}>"
        return f"{self.name[:80]}({', '.join(map(_short, self.args[:3]))}{', ...' if len(self.args) > 3 else ''})"


def _short(value: Any) -> str:
    if type(value) is str:
        return repr(value) if len(value) <= 40 else repr(value[:37]) + "..."
    if type(value) in (bool, float, type(None)) or (type(value) is int and abs(value) < 10**18):
        return repr(value)
    return f"<{type(value).__name__}>"


@dataclass(frozen=True, slots=True)
class Rebuild:
    """What a pickle may call: our own function, given the tuple of arguments, which may hold anything.

    It raises ValueError for arguments it does not accept.

    Args:
        function: what is called.
        nbytes: what its result takes in memory, or as many bytes as take the rest of the pickle as much time.
    """

    function: Callable[[tuple[Any, ...]], Any]
    nbytes: int = 320


@dataclass(frozen=True, slots=True)
class Record:
    """A class of which a pickle holds so many objects that an `Inert` for each would fill the memory.

    Args:
        kind: made without arguments for each; a dataclass with slots and no equality. Of an object's state it keeps
            what it has slots for, and that must be flat: plain values, or one tuple or list of them.
    """

    kind: type


def load(
    data: bytes,
    where: str,
    known: Known | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    max_operations: int = MAX_OPERATIONS,
    max_memory: int = MAX_MEMORY,
) -> Any:
    """The tree of objects a pickle describes, with an `Inert` for everything that is not plain data.

    Plain data is None, bool, int, float, str, bytes, bytearray, list, tuple, dict, OrderedDict (as dict, attributes
    dropped), set, frozenset.

    Args:
        data: the pickle.
        where: what it is, for messages.
        known: values for global names; a `Rebuild` or a `Record` may be called.
        persistent_load: turns a persistent id into an object; raises ValueError for one it does not accept.
        max_operations: bound on opcodes executed, which sets the time.
        max_memory: bound on bytes of what is made and copied.

    Raises:
        CheckpointError: the pickle is damaged, or does what no checkpoint needs.
    """
    machine = _Machine(known or {}, persistent_load, max_operations, max_memory)
    try:
        tree = machine.run(data)
        _check_nesting(tree, machine.shared)
    except (ValueError, DeprecationWarning) as error:  # the latter under `python -W error`, for odd escapes
        text = str(error) if len(str(error)) <= _MAX_ERROR else f"{str(error)[:_MAX_ERROR]}..."  # some quote the file
        raise CheckpointError(f"{where} is damaged or hostile: {text}; nothing was executed.") from None
    return tree


_CHEAP_KEYS = frozenset((str, bytes, bool, float, type(None), Inert))

_ORDERED_DICT = ("collections", "OrderedDict")
_TOO_MUCH = "it takes more memory than any checkpoint needs"
_FLAT = (str, int, float, bool, type(None))
_FLAT_KINDS = frozenset(_FLAT)


_CONTAINERS = frozenset((dict, list, set, frozenset, Inert))


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(
        self, known: Known, persistent_load: Callable[[Any], Any] | None, max_operations: int, max_memory: int
    ) -> None:
        self._known = known
        self._kinds = {value.kind for value in known.values() if type(value) is Record}
        self._persistent_load = persistent_load
        self._max_operations = max_operations
        self._memory_left = max_memory
        self._other_keys_left = _MAX_OTHER_KEYS
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._stored = 0
        self._recalled = b""  # whether each number of the memo is
        self.shared: set[int] = set()  # the id of every object that may lie in more than one place

    def run(self, data: bytes) -> Any:
        """Execute the opcodes up to STOP; ValueError for anything unexpected."""
        self._recalled = _recalled(data)
        stream, memo, stack = io.BytesIO(data), self._memo, self._stack
        start, position, end = 0, 0, len(data)
        integers_left = self._memory_left // _INTEGER_BYTES
        try:
            for _ in range(self._max_operations):
                start, position = position, position + 1
                if start == end:
                    raise ValueError("pickle exhausted before seeing STOP")
                code = data[start]
                # The few opcodes that most of a large pickle consists of come first; the table knows every other.
                if code == _MEMOIZE:
                    if self._recalled[self._stored]:
                        self._put(self._stored)
                    else:
                        self._stored += 1
                elif code == _LONG_BINGET:
                    (index,) = _UINT4.unpack_from(data, position)
                    position += 4
                    stack.append(memo[index] if index in memo else self._recall(index))
                elif code == _BINGET:
                    index = data[position]
                    position += 1
                    stack.append(memo[index] if index in memo else self._recall(index))
                elif code == _BININT2:
                    stack.append(_UINT2.unpack_from(data, position)[0])
                    position += 2
                    if (integers_left := integers_left - 1) < 0:
                        raise ValueError(_TOO_MUCH)
                elif code == _BININT1:
                    stack.append(data[position])
                    position += 1
                elif code == _BININT:
                    stack.append(_INT4.unpack_from(data, position)[0])
                    position += 4
                    if (integers_left := integers_left - 1) < 0:
                        raise ValueError(_TOO_MUCH)
                elif code == _MARK:
                    self._below_marks.append(stack)
                    stack = self._stack = []
                elif _TUPLE1 <= code <= _TUPLE3:
                    stack.append(tuple(self._pop_many(code - _TUPLE1 + 1)))
                    self._spend(_TUPLE_BYTES)
                elif code == _EMPTY_TUPLE:
                    stack.append(())
                elif code == _EMPTY_DICT:
                    stack.append({})
                    self._spend(_DICT_BYTES)
                elif code == _STOP:
                    return self._pop()
                else:
                    read_argument, action = _STEPS[code]
                    value = None
                    if read_argument is not None:
                        stream.seek(position)
                        value = read_argument(stream)
                        position = stream.tell()
                    action(self, value)
                    stack = self._stack
        except (IndexError, struct.error):
            raise ValueError(f"pickle ends inside of an opcode (pickle byte {start})") from None
        except ValueError as error:
            raise ValueError(f"{error} (pickle byte {start})") from None
        raise ValueError("it takes more operations than any checkpoint needs")

    def _spend(self, nbytes: int) -> None:
        self._memory_left -= nbytes
        if self._memory_left < 0:
            raise ValueError(_TOO_MUCH)

    def _room_for(self, target: Any, items: int) -> int:
        """What a collection takes now, in bytes, where there is room for more of them, twice while it grows."""
        if _MEMBER_BYTES * items > self._memory_left:
            raise ValueError(_TOO_MUCH)
        return sys.getsizeof(target)

    def _share(self, values: Iterable[Any]) -> None:
        """Note what is put into another object without being taken out of the one it is in."""
        for value in filter(_is_container, values):
            self._spend(_MEMO_BYTES)
            self.shared.add(id(value))

    # The stack.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _nothing(self, _: Any) -> None:
        pass

    def _refuse(self, name: str) -> None:
        raise ValueError(f"no checkpoint needs opcode {name}")

    def _make(self, value: Any) -> None:
        """Push something that was not there before."""
        if type(value) is int and value.bit_length() > _MAX_INTEGER_BITS:
            raise ValueError(f"it holds an integer of {value.bit_length()} bits, which no number of a checkpoint has")
        self._spend(sys.getsizeof(value) + _STACK_BYTES)
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise ValueError("it takes from an empty stack")
        return self._stack.pop()

    def _pop_many(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("it takes from an empty stack")
        split = len(self._stack) - count
        taken = self._stack[split:]
        del self._stack[split:]
        return taken

    def _pop_tuple(self) -> tuple[Any, ...]:
        value = self._pop()
        if type(value) is not tuple:
            raise ValueError(f"arguments are a {type(value).__name__}, expected a tuple")
        return value

    def _pop_mark(self) -> list[Any]:
        if not self._below_marks:
            raise ValueError("it takes from below a mark that is not there")
        items, self._stack = self._stack, self._below_marks.pop()
        return items

    def _drop_mark(self, _: Any) -> None:
        self._pop_mark()

    def _drop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _duplicate(self, _: Any) -> None:
        value = self._pop()
        self._share((value,))
        self._stack += [value, value]

    def _get(self, index: int) -> None:
        self._push(self._recall(index))

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            raise ValueError(f"it recalls object {index}, which it never stored")
        return self._memo[index]

    def _put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise ValueError(f"it stores an object as number {_short(index)}")
        if not self._stack:
            raise ValueError("it takes from an empty stack")
        self._stored += 1
        if index >= len(self._recalled) or self._recalled[index]:
            self._spend(_MEMO_BYTES)
            self._memo[index] = value = self._stack[-1]
            if _is_container(value):
                self.shared.add(id(value))

    # Collections.

    def _append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _extend(self, items: list[Any]) -> None:
        target = self._pop()
        if type(target) is list:
            target.extend(items)
        elif type(target) is Inert:
            target.items.extend(items)
        else:
            raise ValueError(f"it appends to a {type(target).__name__}")
        self._push(target)

    def _set_items(self, items: list[Any]) -> None:
        target, pairs = self._pop(), _pairs(items)
        if type(target) is dict:
            before = self._room_for(target, len(items) // 2)
            self._check_keys(items[::2])
            target.update(pairs)
            self._spend(sys.getsizeof(target) - before)
        elif type(target) is Inert:
            self._spend(_MEMBER_BYTES * (len(items) // 2))
            target.entries.extend(pairs)
        else:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        self._push(target)

    def _add_items(self, _: Any) -> None:
        items, target = self._pop_mark(), self._pop()
        if type(target) is not set:
            raise ValueError(f"it adds items to a {type(target).__name__}")
        before = self._room_for(target, len(items))
        self._check_keys(items)
        target.update(items)
        self._spend(sys.getsizeof(target) - before)
        self._push(target)

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self._room_for({}, len(items) // 2)
        self._check_keys(items[::2])
        self._make(dict(_pairs(items)))

    def _frozenset(self, _: Any) -> None:
        items = self._pop_mark()
        self._room_for({}, len(items))
        self._check_keys(items)
        self._make(frozenset(items))

    def _check_keys(self, keys: Sequence[Any]) -> None:
        if not _CHEAP_KEYS.issuperset(map(type, keys)):
            for key in keys:
                self._check_key(key)

    def _check_key(self, key: Any) -> None:
        kind = type(key)
        if kind in _CHEAP_KEYS or kind in self._kinds or (kind is int and abs(key) < _MAX_INTEGER_KEY):
            return
        self._other_keys_left -= 1
        if kind is tuple and len(key) <= _MAX_KEY_ITEMS and tuple not in map(type, key):
            for item in key:
                self._check_key(item)
        elif kind in (int, tuple, list, dict, set, frozenset, bytearray):
            raise ValueError(f"a {kind.__name__} that no checkpoint needs is a key")
        if self._other_keys_left < 0:
            raise ValueError(f"more than {_MAX_OTHER_KEYS} keys are tuples")

    # Objects.

    def _global(self, value: str) -> None:
        module, _, name = value.partition(" ")
        self._push_global(module, name)

    def _stack_global(self, _: Any) -> None:
        module, name = self._pop_many(2)
        self._push_global(module, name)

    def _push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError(f"it names a global with a {type(module).__name__} and a {type(name).__name__}")
        known = self._known.get((module, name))
        self._push(self._inert(module, name, None) if known is None else known)

    def _reduce(self, _: Any) -> None:
        args = self._pop_tuple()
        self._call(self._pop(), args)

    def _new_object_with_keywords(self, _: Any) -> None:
        keywords, args = self._pop(), self._pop_tuple()
        self._spend(sys.getsizeof(args))
        self._share(args)
        self._call(self._pop(), (*args, keywords))

    def _object(self, _: Any) -> None:
        items = self._pop_mark()
        if not items:
            raise ValueError("it makes an object of no class")
        self._call(items[0], tuple(items[1:]))

    def _instance(self, value: str) -> None:
        args = tuple(self._pop_mark())
        self._global(value)
        self._call(self._pop(), args)

    def _call(self, callee: Any, args: tuple[Any, ...]) -> None:
        if type(callee) is Rebuild:
            self._spend(callee.nbytes)
            result = callee.function(args)
        elif type(callee) is Record:
            self._spend(_RECORD_BYTES)
            result = callee.kind()
        elif type(callee) is not Inert:
            raise ValueError(f"it calls a {type(callee).__name__}")
        elif (callee.module, callee.name) == _ORDERED_DICT and callee.args is None:
            result = self._ordered_dict(args)
        elif callee.args is None:
            result = self._inert(callee.module, callee.name, args)
        else:
            result = self._inert(callee.module, f"{callee.name[:80]}()", args)
        self._push(result)

    def _inert(self, module: str, name: str, args: tuple[Any, ...] | None) -> Inert:
        self._spend(_OBJECT_BYTES)
        return Inert(module, name, args)

    def _ordered_dict(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        pairs = args[0] if args else []
        if len(args) > 1 or type(pairs) is not list:
            raise ValueError("an OrderedDict is made from something else than a list of pairs")
        self._spend(_MEMBER_BYTES * (len(pairs) + 1))
        if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("an OrderedDict is made from something else than pairs")
        self._share(itertools.chain.from_iterable(pairs))
        self._check_keys([key for key, _ in pairs])
        return dict(pairs)

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._pop()
        if type(target) is Inert:
            self._set_state(target, state)
        elif type(target) in self._kinds:
            _set_fields(target, state)
            if id(state) not in self.shared:  # nothing else has it
                self._memory_left += sys.getsizeof(state)
        elif type(target) is not dict:  # the attributes of an OrderedDict, as state_dict's _metadata, are dropped
            raise ValueError(f"it sets the state of a {type(target).__name__}")
        self._push(target)

    def _set_state(self, target: Inert, state: Any) -> None:
        # An object with slots has the pair (its dict or None, its slots).
        is_pair = type(state) is tuple and len(state) == 2 and all(type(s) in (dict, type(None)) for s in state)
        parts = [part for part in state if part is not None] if is_pair else [state]
        for part in parts:
            if type(part) is dict:
                self._spend(_MEMBER_BYTES * len(part))
                self._share(part.values())
            if type(part) is dict and all(type(name) is str for name in part):
                vars(target).update(part)
            else:
                target.state = part

    def _persistent_id(self, _: Any) -> None:
        if self._persistent_load is None:
            raise ValueError("it refers to objects outside of it")
        self._spend(_PERSISTENT_BYTES)
        self._push(self._persistent_load(self._pop()))


def _set_fields(target: Any, state: Any) -> None:
    """The fields of a `Record` from an object's state."""
    if type(state) is not dict:
        raise ValueError(f"the state of a {type(target).__name__} is a {type(state).__name__}, expected a dict")
    for name in target.__slots__:
        if name in state:
            value = state[name]
            parts = value if type(value) in (tuple, list) else (value,)
            if not all(type(part) in _FLAT for part in parts):
                raise ValueError(f"{name} of a {type(target).__name__} is no plain value")
            setattr(target, name, tuple(value) if type(value) is list else value)


# What every opcode does: the reader of its argument, and the action. Literals push their argument.

_Action = Callable[[_Machine, Any], None]

_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
)
_ACTIONS: dict[str, _Action] = {
    **dict.fromkeys(_LITERALS, _Machine._make),
    **dict.fromkeys(("PROTO", "FRAME"), _Machine._nothing),
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_LIST": lambda machine, _: machine._make([]),
    "EMPTY_SET": lambda machine, _: machine._make(set()),
    "POP": _Machine._drop,
    "POP_MARK": _Machine._drop_mark,
    "DUP": _Machine._duplicate,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    "MEMOIZE": lambda machine, _: machine._put(machine._stored),
    "APPEND": _Machine._append,
    "APPENDS": lambda machine, _: machine._extend(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._pop_many(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_mark()),
    "ADDITEMS": _Machine._add_items,
    "LIST": lambda machine, _: machine._make(machine._pop_mark()),
    "TUPLE": lambda machine, _: machine._make(tuple(machine._pop_mark())),
    "DICT": _Machine._dict,
    "FROZENSET": _Machine._frozenset,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,
    "NEWOBJ_EX": _Machine._new_object_with_keywords,
    "OBJ": _Machine._object,
    "INST": _Machine._instance,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent_id,
}
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}


def _step(code: int) -> tuple[Callable[[io.BytesIO], Any] | None, _Action]:
    opcode = _OPCODES.get(code)
    if opcode is None:
        return None, lambda machine, _: machine._refuse(f"0x{code:02x}, which is unknown")
    action = _ACTIONS.get(opcode.name, lambda machine, _: machine._refuse(opcode.name))
    return opcode.arg.reader if opcode.arg else None, action


_STEPS = tuple(_step(code) for code in range(256))
_CODES = {opcode.name: code for code, opcode in _OPCODES.items()}
_MEMOIZE, _MARK, _STOP = _CODES["MEMOIZE"], _CODES["MARK"], _CODES["STOP"]
_EMPTY_TUPLE, _EMPTY_DICT = _CODES["EMPTY_TUPLE"], _CODES["EMPTY_DICT"]
_TUPLE1, _TUPLE3 = _CODES["TUPLE1"], _CODES["TUPLE3"]  # and TUPLE2 between them
_BINGET, _LONG_BINGET = _CODES["BINGET"], _CODES["LONG_BINGET"]
_BININT1, _BININT2, _BININT = _CODES["BININT1"], _CODES["BININT2"], _CODES["BININT"]
_UINT2, _UINT4, _INT4 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
_STORES = tuple(bytes([_CODES[name]]) for name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"))
_SCANNED = 1 << 20  # bytes looked at together
_GET_AS_TEXT = re.compile(rb"g(\d{1,10})\n")


def _recalled(data: bytes) -> bytes:
    """Which numbers of the memo a pickle may recall: all that its bytes could be taken to ask for, and those are few.

    Python's pickler stores nearly every object and recalls nearly none; keeping them all would triple the memory.
    """
    recalled = np.zeros(1 + sum(data.count(code) for code in _STORES), bool)  # it stores no more than that
    for code, width in ((_BINGET, 1), (_LONG_BINGET, 4)):
        for start in range(0, len(data), _SCANNED):
            part = np.frombuffer(data[start : start + _SCANNED + width], np.uint8)
            at = np.flatnonzero(part[: max(len(part) - width, 0)] == code)
            digits = part[at[:, None] + np.arange(1, width + 1)].astype(np.int64)
            numbers = digits @ (256 ** np.arange(width))
            recalled[numbers[numbers < len(recalled)]] = True
    for match in _GET_AS_TEXT.finditer(data):
        if int(match[1]) < len(recalled):
            recalled[int(match[1])] = True
    return recalled.tobytes()


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key has no value")
    return zip(items[::2], items[1::2], strict=True)


def _check_nesting(tree: Any, shared: set[int]) -> None:
    """Refuse what would exhaust the stack of whoever walks the tree: deep nesting, and an object inside itself.

    Visits an object once, however often it is referred to: the height of a shared one is known once it is left.
    """
    heights: dict[int, int | None] = {id(tree): None}  # None while its children are being visited
    path: list[tuple[Any, Iterator[Any]]] = [(tree, _children(tree))]
    tallest_child = [0]
    while path:
        node, children = path[-1]
        child = next((child for child in children if _is_container(child)), None)
        if child is None:
            path.pop()
            height = tallest_child.pop() + 1
            if id(node) in shared:
                heights[id(node)] = height
            if path:
                tallest_child[-1] = max(tallest_child[-1], height)
        elif id(child) not in heights:
            if id(child) in shared:
                heights[id(child)] = None
            path.append((child, _children(child)))
            tallest_child.append(0)
        elif (known := heights[id(child)]) is None:
            raise ValueError("it holds an object that contains itself")
        else:
            tallest_child[-1] = max(tallest_child[-1], known)
        if len(path) + (tallest_child[-1] if path else 0) > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")


def _is_container(value: Any) -> bool:
    """Whether something may hold others; the sizes of a tensor or a chunk, of which there are many, do not."""
    kind = type(value)
    if kind is tuple:
        return len(value) > _MAX_KEY_ITEMS or not _FLAT_KINDS.issuperset(map(type, value))
    return kind in _CONTAINERS


def _children(value: Any) -> Iterator[Any]:
    if type(value) is dict:
        yield from value
        yield from value.values()
    elif type(value) is Inert:
        yield from (value.args, value.state, *value.items, *vars(value).values())
        yield from itertools.chain.from_iterable(value.entries)
    elif _is_container(value):
        yield from value
