"""The pickle machine, opcode by opcode, with an account: a pickle pays for what it makes by what it holds.

Python's own unpickler obeys: a pickle of 20 bytes takes gigabytes (a memo's index, a length that is only said), one
of 200 bytes never ends (the hash of a tuple of a tuple twice, 60 times over), one of 300 kB ends the process (the
hash of deep tuples overruns the stack). Here a length is compared with the bytes that are left, what is hashed or
copied is weighed first, and a pickle that weighs more than `PER_BYTE` times its own size is refused.

Protocols 0 to 5, as far as torch, Megatron and Python's pickle write them; no extensions, no buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ckptbridge.converters.errors import BadInputError

PER_BYTE = 4
"""Words of memory, or elements copied or hashed, that a pickle may ask for with each of its bytes. Those of torch and
Megatron ask for 0.1 to 1.2."""
_EMPTY, _KEPT, _TUPLE = 8, 2, 5
"""Words that a container, a place in the memo and a tuple take."""
_DEEPEST = 100
"""Tuples within tuples that may be hashed."""
_LONGEST_INTEGER = 128
"""Bytes of a whole number. A random generator's state has 16."""
_MISSING: Any = object()
_NEVER_BUILT_UPON = (type, torch.dtype, torch.layout)


class PickleMachine:
    """Makes the object of a pickle. Subclasses say which names and which persistent ids there are.

    Raises BadInputError for a pickle that is broken, or that asks for far more than it holds; whatever a called
    function raises passes through.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._left = PER_BYTE * len(data) + (1 << 16)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """What a name stands for; raises for one that is not admitted."""
        raise NotImplementedError

    def persistent_load(self, pid: Any, /) -> Any:
        """What a persistent id stands for; raises for one that is none."""
        raise NotImplementedError

    def load(self) -> Any:
        """Run the whole pickle."""
        data, table = self._data, _OPCODES
        try:
            while True:
                opcode = data[self._at]
                self._at += 1
                if opcode == 0x2E:  # STOP
                    return self.stack.pop()
                table[opcode](self)
        except KeyError as error:
            if isinstance(error.args[0], int):
                self._fail(f"opcode {bytes([data[self._at - 1]])!r} is none that checkpoints have")
            raise
        except IndexError:
            self._fail("it ends, or its stack does, before its object is made")
        except struct.error:
            self._fail("it ends within a number")

    def _fail(self, why: str) -> NoReturn:
        raise BadInputError(f"the pickle cannot be read: at byte {self._at}: {why}")

    # What is paid for.

    def pay(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            self._fail(f"it asks for far more than its {len(self._data)} bytes can hold")

    def _weigh(self, value: Any) -> None:
        """Pay for every element that hashing or copying `value` meets, as often as it meets it."""
        waiting: list[tuple[Any, int]] = [(value, 0)]
        while waiting:
            found, depth = waiting.pop()
            kind: Any = type(found)  # pyright: ignore[reportUnknownVariableType]
            if kind is str or kind is int or found is None:
                self.pay(1 + len(found) // 8 if isinstance(found, str) else 1)
                continue
            if depth > _DEEPEST:
                self._fail(f"values lie more than {_DEEPEST} deep in a key")
            inner: Any = ()
            if isinstance(found, tuple | list | set | frozenset):
                inner = found  # pyright: ignore[reportUnknownVariableType]
            elif isinstance(found, bytes | bytearray | dict | range):
                self.pay(_length(found) // 8)
            elif isinstance(found, slice):
                inner = (found.start, found.stop, found.step)  # pyright: ignore
            elif not isinstance(found, type) and kind.__hash__ is not None and hasattr(found, "__dict__"):
                inner = list(vars(found).values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            self.pay(1 + len(inner))
            waiting += [(item, depth + 1) for item in inner]

    def _key(self, value: Any) -> Any:
        if type(value) is not str and type(value) is not int:
            self._weigh(value)
        return value

    def _call(self, function: Any, arguments: Any, named: Any = None) -> Any:
        if not isinstance(arguments, tuple):
            self._fail("a call's arguments are no tuple")
        self.pay(_EMPTY)
        for argument in arguments:  # pyright: ignore[reportUnknownVariableType]
            self._weigh(argument)
        if named is not None:
            self.pay(len(named))
        return function(*arguments, **(named or {}))

    # Reading.

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self._data) - self._at:
            self._fail(f"{count} bytes are said to follow, {len(self._data) - self._at} do")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self._data, self._at)
        self._at += form.size
        return value

    def line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            self._fail("a line has no end")
        line = self.take(end - self._at).decode()
        self._at += 1
        return line

    def items(self) -> list[Any]:
        """What stands above the last mark; it and the mark are taken off."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def get(self, index: int) -> None:
        value = self.memo.get(index, _MISSING)
        if value is _MISSING:
            self._fail(f"nothing was kept under number {index}")
        self.stack.append(value)

    # Opcodes that are more than a line.

    def whole_number(self, count: int) -> None:
        if count > _LONGEST_INTEGER:
            self._fail(f"a whole number of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def decimal(self) -> None:
        line = self.line().removesuffix("L")
        if len(line) > 2 * _LONGEST_INTEGER:
            self._fail(f"a whole number of {len(line)} digits")
        self.stack.append({"00": False, "01": True}.get(line, _MISSING) if line in ("00", "01") else int(line))

    def append(self) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def appends(self) -> None:
        items = self.items()
        self.stack[-1].extend(items)

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self._key(self.stack.pop())
        self.stack[-1][key] = value

    def set_items(self, held: Any = None) -> None:
        items = self.items()
        target = self.stack[-1] if held is None else held
        if len(items) % 2:
            self._fail("a key has no value")
        for at in range(0, len(items), 2):
            target[self._key(items[at])] = items[at + 1]

    def dictionary(self) -> None:
        made: dict[Any, Any] = {}
        self.set_items(made)
        self.stack.append(made)

    def hashed_items(self) -> list[Any]:
        return [self._key(item) for item in self.items()]

    def add_items(self) -> None:
        items = self.hashed_items()
        self.stack[-1].update(items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.pay(_TUPLE)
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def named_in_lines(self) -> None:
        module, name = self.line(), self.line()
        self.stack.append(self.find_class(module, name))

    def named_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self._fail("a name is no text")
        self.stack.append(self.find_class(module, name))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def new_object(self, named: Any = None) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, type) or not isinstance(arguments, tuple):
            self._fail("an object is made of something that is no class")
        made: Any = kind.__new__
        self.stack.append(self._call(made, (kind, *arguments), named))  # pyright: ignore[reportUnknownArgumentType]

    def new_object_with_names(self) -> None:
        named = self.stack.pop()
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):  # pyright: ignore
            self._fail("an object's named arguments have no names")
        self.new_object(named)  # pyright: ignore[reportUnknownArgumentType]

    def build(self) -> None:
        """Give an object its state: its own way if it has one, else as attributes."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _NEVER_BUILT_UPON) or not hasattr(target, "__dict__"):
            self._fail(f"a state is given to a value of {type(target).__name__}")
        if (own := getattr(target, "__setstate__", None)) is not None:
            self._weigh(state)
            own(state)
            return
        plain, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)  # pyright: ignore
        for held in (plain, slots):  # pyright: ignore[reportUnknownVariableType]
            if not held:
                continue
            if not isinstance(held, dict):
                self._fail("an object's state is no dictionary")
            self.pay(len(held))  # pyright: ignore[reportUnknownArgumentType]
            for name, value in held.items():  # pyright: ignore[reportUnknownVariableType]
                if not isinstance(name, str) or (name.startswith("__") and name.endswith("__")):
                    self._fail("an object's state names no attribute")
                target.__dict__[name] = value

    def referred(self) -> None:
        self.stack[-1] = self.persistent_load(self.stack[-1])

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()


def _length(value: Any) -> int:
    try:
        return len(value)
    except OverflowError:  # a range beyond what an index can count
        return 1 << 62


Action = Callable[[PickleMachine], object]
"""What is returned is thrown away."""
_U1, _U2, _U4, _I4, _U8 = (struct.Struct(f"<{letter}") for letter in "BHIiQ")
_F8 = struct.Struct(">d")


def _empty(make: Callable[[], Any]) -> Action:
    def push(machine: PickleMachine) -> None:
        machine.pay(_EMPTY)
        machine.stack.append(make())

    return push


def _push(make: Callable[[PickleMachine], Any]) -> Action:
    return lambda machine: machine.stack.append(make(machine))


def _text(form: struct.Struct, encoding: str = "utf-8") -> Action:
    return _push(lambda machine: machine.take(machine.number(form)).decode(encoding, "surrogatepass"))


def _raw(form: struct.Struct, kind: Callable[[bytes], Any] = bytes) -> Action:
    return _push(lambda machine: kind(machine.take(machine.number(form))))


def _put(number: Callable[[PickleMachine], int]) -> Action:
    def put(machine: PickleMachine) -> None:
        machine.pay(_KEPT)
        machine.memo[number(machine)] = machine.stack[-1]

    return put


_ACTIONS: dict[str, Action] = {
    "\x80": lambda m: m.take(1),  # PROTO
    "\x95": lambda m: m.number(_U8),  # FRAME
    "(": lambda m: m.marks.append(len(m.stack)),
    "0": PickleMachine.pop,
    "1": lambda m: m.items(),
    "2": _push(lambda m: m.stack[-1]),
    "N": _push(lambda m: None),
    "\x88": _push(lambda m: True),
    "\x89": _push(lambda m: False),
    "I": PickleMachine.decimal,
    "L": PickleMachine.decimal,
    "J": _push(lambda m: m.number(_I4)),
    "K": _push(lambda m: m.number(_U1)),
    "M": _push(lambda m: m.number(_U2)),
    "\x8a": lambda m: m.whole_number(m.number(_U1)),
    "\x8b": lambda m: m.whole_number(m.number(_I4)),
    "F": _push(lambda m: float(m.line())),
    "G": _push(lambda m: m.number(_F8)),
    "V": _push(lambda m: m.line().encode().decode("raw-unicode-escape")),
    "X": _text(_U4),
    "\x8c": _text(_U1),
    "\x8d": _text(_U8),
    "T": _text(_I4, "ascii"),
    "U": _text(_U1, "ascii"),
    "B": _raw(_U4),
    "C": _raw(_U1),
    "\x8e": _raw(_U8),
    "\x96": _raw(_U8, bytearray),
    "]": _empty(list),
    ")": _push(lambda m: ()),
    "}": _empty(dict),
    "\x8f": _empty(set),
    "l": _push(lambda m: m.items()),
    "t": _push(lambda m: tuple(m.items())),
    "d": PickleMachine.dictionary,
    "\x85": lambda m: m.tuple_of(1),
    "\x86": lambda m: m.tuple_of(2),
    "\x87": lambda m: m.tuple_of(3),
    "\x91": _push(lambda m: frozenset(m.hashed_items())),
    "a": PickleMachine.append,
    "e": PickleMachine.appends,
    "s": PickleMachine.set_item,
    "u": PickleMachine.set_items,
    "\x90": PickleMachine.add_items,
    "g": lambda m: m.get(int(m.line()[:20])),
    "h": lambda m: m.get(m.number(_U1)),
    "j": lambda m: m.get(m.number(_U4)),
    "p": _put(lambda m: int(m.line()[:20])),
    "q": _put(lambda m: m.number(_U1)),
    "r": _put(lambda m: m.number(_U4)),
    "\x94": _put(lambda m: len(m.memo)),
    "c": PickleMachine.named_in_lines,
    "\x93": PickleMachine.named_on_stack,
    "R": PickleMachine.reduce,
    "b": PickleMachine.build,
    "\x81": PickleMachine.new_object,
    "\x92": PickleMachine.new_object_with_names,
    "Q": PickleMachine.referred,
}
_OPCODES = {ord(opcode): action for opcode, action in _ACTIONS.items()}
