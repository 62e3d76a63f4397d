# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Reading a pickle without running it.

A pickle is a program, and an unpickler the interpreter that runs it. Subclassing `pickle.Unpickler` replaces only the
lookup of globals: REDUCE, NEWOBJ, INST, OBJ and BUILD still call what lies on the stack, or its `__setstate__`,
`append` and `extend`, and the extension registry stays open. Each of those doors would have to be closed by hand, in C
code that cannot be overridden or in its private Python twin, and again in every later version. So neither is used:
`pickletools.genops`, which decodes and runs nothing, splits the pickle into opcodes, and the machine below gives each
of them a meaning in which nothing from the file is called or imported:

    a global name           `known[module, name]`, a value of the caller's, or an `Inert` that keeps the name
    calling an `Inert`      another `Inert`, which keeps the arguments
    calling a `Rebuild`     the one thing that runs: the caller's own function, written for untrusted arguments
    state, items, entries   kept in the `Inert`

Bounded, too: the operations, the copies, the nesting, and what may be hashed (the hash of nested tuples takes
exponential time or all of the C stack, a dict of colliding keys quadratic time).
"""

import itertools
import pickletools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

MAX_OPERATIONS = 4_000_000
MAX_DEPTH = 100
# Of an object, beside the one for its opcode: bounds the memory of a pickle that makes nothing but objects.
_OBJECT_OPERATIONS = 4

# Keys whose hashes cost little and cannot be made to collide: by Python's random seed, by identity, or, for integers
# below the modulus of their hash, by being equal. There may be few of any others.
_MAX_INTEGER_KEY = 2**61 - 1
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
    """

    function: Callable[[tuple[Any, ...]], Any]


def load(
    data: bytes,
    where: str,
    known: Known | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    max_operations: int = MAX_OPERATIONS,
) -> Any:
    """The tree of objects a pickle describes, with an `Inert` for everything that is not plain data.

    Plain data is None, bool, int, float, str, bytes, bytearray, list, tuple, dict, OrderedDict (as dict, attributes
    dropped), set, frozenset.

    Args:
        data: the pickle.
        where: what it is, for messages.
        known: values for global names; a `Rebuild` may be called.
        persistent_load: turns a persistent id into an object; raises ValueError for one it does not accept.
        max_operations: bound on opcodes executed and items copied; sets time and memory.

    Raises:
        CheckpointError: the pickle is damaged, or does what no checkpoint needs.
    """
    machine = _Machine(known or {}, persistent_load, max_operations)
    try:
        tree = machine.run(data)
        _check_nesting(tree)
    except (ValueError, DeprecationWarning) as error:  # the latter under `python -W error`, for odd escapes
        raise CheckpointError(f"{where} is damaged or hostile: {error}; nothing was executed.") from None
    return tree


_CHEAP_KEYS = (str, bytes, bool, float, type(None), Inert)

# Opcodes whose meaning is the value that `genops` decodes.
_INTEGERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_FLOATS = ("FLOAT", "BINFLOAT")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_STRINGS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
_LITERALS = frozenset((*_INTEGERS, *_FLOATS, *_BYTES, *_STRINGS))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_ORDERED_DICT = ("collections", "OrderedDict")


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, known: Known, persistent_load: Callable[[Any], Any] | None, max_operations: int) -> None:
        self._known = known
        self._persistent_load = persistent_load
        self._operations_left = max_operations
        self._other_keys_left = _MAX_OTHER_KEYS
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Execute the opcodes up to STOP; ValueError for anything unexpected."""
        for opcode, value, position in pickletools.genops(data):
            name = opcode.name
            try:
                self._spend(1)
                if name in _LITERALS:
                    self._push(value)
                elif name in _CONSTANTS:
                    self._push(_CONSTANTS[name])
                elif name in _TUPLES:
                    self._push(tuple(self._pop_many(_TUPLES[name])))
                elif name in _EMPTY:
                    self._spend(_OBJECT_OPERATIONS)
                    self._push(_EMPTY[name]())
                elif name in ("STOP", "PROTO", "FRAME"):
                    continue
                elif (action := _ACTIONS.get(name)) is None:
                    raise ValueError(f"no checkpoint needs opcode {name}")
                else:
                    action(self, value)
            except ValueError as error:
                raise ValueError(f"{error} (pickle byte {position})") from None
        return self._pop()

    def _spend(self, operations: int) -> None:
        self._operations_left -= operations
        if self._operations_left < 0:
            raise ValueError("it takes more operations than any checkpoint needs")

    # The stack.

    def _push(self, value: Any) -> None:
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

    def _push_mark(self, _: Any) -> None:
        self._below_marks.append(self._stack)
        self._stack = []

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
        self._stack += [value, value]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"it recalls object {index}, which it never stored")
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise ValueError(f"it stores an object as number {_short(index)}")
        value = self._pop()
        self._memo[index] = value
        self._push(value)

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
        target, pairs = self._pop(), list(_pairs(items))
        if type(target) is dict:
            target.update(self._hashable_pairs(pairs))
        elif type(target) is Inert:
            target.entries.extend(pairs)
        else:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        self._push(target)

    def _add_items(self, _: Any) -> None:
        items, target = self._pop_mark(), self._pop()
        if type(target) is not set:
            raise ValueError(f"it adds items to a {type(target).__name__}")
        target.update(map(self._hashable, items))
        self._push(target)

    def _dict(self, _: Any) -> None:
        self._push(dict(self._hashable_pairs(_pairs(self._pop_mark()))))

    def _frozenset(self, _: Any) -> None:
        self._push(frozenset(map(self._hashable, self._pop_mark())))

    def _hashable_pairs(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        return ((self._hashable(key), value) for key, value in pairs)

    def _hashable(self, key: Any) -> Any:
        kind = type(key)
        if kind in _CHEAP_KEYS or (kind is int and abs(key) < _MAX_INTEGER_KEY):
            return key
        self._other_keys_left -= 1
        if kind is tuple and len(key) <= _MAX_KEY_ITEMS and tuple not in map(type, key):
            for item in key:
                self._hashable(item)
        elif kind in (int, tuple, list, dict, set, frozenset, bytearray):
            raise ValueError(f"a {kind.__name__} that no checkpoint needs is a key")
        if self._other_keys_left < 0:
            raise ValueError(f"more than {_MAX_OTHER_KEYS} keys are tuples")
        return key

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
        self._spend(len(args))
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
            result = callee.function(args)
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
        self._spend(_OBJECT_OPERATIONS)
        return Inert(module, name, args)

    def _ordered_dict(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        pairs = args[0] if args else []
        if len(args) > 1 or type(pairs) is not list:
            raise ValueError("an OrderedDict is made from something else than a list of pairs")
        self._spend(len(pairs))
        if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("an OrderedDict is made from something else than pairs")
        return dict(self._hashable_pairs((key, value) for key, value in pairs))

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._pop()
        if type(target) is Inert:
            self._set_state(target, state)
        elif type(target) is not dict:  # the attributes of an OrderedDict, as state_dict's _metadata, are dropped
            raise ValueError(f"it sets the state of a {type(target).__name__}")
        self._push(target)

    def _set_state(self, target: Inert, state: Any) -> None:
        # An object with slots has the pair (its dict or None, its slots).
        is_pair = type(state) is tuple and len(state) == 2 and all(type(s) in (dict, type(None)) for s in state)
        parts = [part for part in state if part is not None] if is_pair else [state]
        for part in parts:
            if type(part) is dict:
                self._spend(len(part))
            if type(part) is dict and all(type(name) is str for name in part):
                vars(target).update(part)
            else:
                target.state = part

    def _persistent_id(self, _: Any) -> None:
        if self._persistent_load is None:
            raise ValueError("it refers to objects outside of it")
        self._push(self._persistent_load(self._pop()))


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._push_mark,
    "POP": _Machine._drop,
    "POP_MARK": _Machine._drop_mark,
    "DUP": _Machine._duplicate,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    "APPEND": _Machine._append,
    "APPENDS": lambda machine, _: machine._extend(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._pop_many(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_mark()),
    "ADDITEMS": _Machine._add_items,
    "LIST": lambda machine, _: machine._push(machine._pop_mark()),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._pop_mark())),
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


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key has no value")
    return zip(items[::2], items[1::2], strict=True)


def _check_nesting(tree: Any) -> None:
    """Refuse what would exhaust the stack of whoever walks the tree: deep nesting, and an object inside itself.

    Visits an object once, however often it is referred to: its height is known once it is left.
    """
    heights: dict[int, int | None] = {id(tree): None}  # None while its children are being visited
    path: list[tuple[Any, Iterator[Any]]] = [(tree, _children(tree))]
    tallest_child = [0]
    while path:
        node, children = path[-1]
        child = next((child for child in children if _is_container(child)), None)
        if child is None:
            path.pop()
            heights[id(node)] = height = tallest_child.pop() + 1
            if path:
                tallest_child[-1] = max(tallest_child[-1], height)
        elif id(child) not in heights:
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
    return type(value) in (dict, list, tuple, set, frozenset, Inert)


def _children(value: Any) -> Iterator[Any]:
    if type(value) is dict:
        yield from value
        yield from value.values()
    elif type(value) is Inert:
        yield from (value.args, value.state, *value.items, *vars(value).values())
        yield from itertools.chain.from_iterable(value.entries)
    elif _is_container(value):
        yield from value
