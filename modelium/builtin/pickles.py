"""Reads pickles without running them: an interpreter that knows containers, numbers and PyTorch's tensors, no more.

Python's own unpickler imports and calls whatever a pickle names. Here a name becomes an inert `Global`, and a call is
carried out only for the few names from which PyTorch builds tensors, by code of ours that makes descriptions of them.
Opcodes are split by the standard library's `pickletools`, which runs nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, cast

from modelium.errors import ModelError

MAX_OPCODES = 20_000_000
"""A state dict takes about forty for each tensor."""
MAX_ARGUMENT_BYTES = 64 << 20
"""Weights lie outside the pickle, so that no single string or number in it is large."""

STORAGE_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
"""PyTorch's storage classes, in safetensors' words."""

TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip

CALLS = frozenset({
    "collections.OrderedDict", "torch.Size", "torch.device", "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
})  # fmt: skip
ALLOWED = (
    CALLS
    | {f"torch.{name}" for name in STORAGE_DTYPES}
    | {f"torch.{name}" for name in TORCH_DTYPES}
    | {"torch.storage.UntypedStorage"}
)
"""All names that weights have a use for."""


class Refused(ModelError):
    """A pickle that asks for more than tensors, or that is not well formed."""

    code = "pickle_code"


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle asks for; never imported."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """What would have come of a call that is not carried out."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers outside the pickle."""

    key: str
    dtype: str
    count: int
    """In elements of `dtype`."""

    @property
    def nbytes(self) -> int:
        return self.count * item_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor as a view of a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True)
class Survey:
    """What a pickle would ask for."""

    names: set[str] = field(default_factory=set)
    opcodes: int = 0
    problem: str = ""
    """Why it could not be read to its end; empty when it could."""

    @property
    def foreign(self) -> list[str]:
        """The names that weights have no use for."""
        return sorted(self.names - ALLOWED)


def survey(stream: BinaryIO, into: Survey | None = None) -> Survey:
    """All names that one pickle asks for, as far as it can be read; leaves `stream` behind its end."""
    result = into if into is not None else Survey()
    machine = _Machine(result)
    try:
        machine.run(stream)
    except Refused as exc:
        result.problem = exc.message
    return result


def load(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value of one pickle, with `TensorView` for tensors; `storages` takes what it refers to, by key.

    Raises `Refused` when it asks for anything else.
    """
    machine = _Machine(None)
    value = machine.run(stream)
    if storages is not None:
        storages.update(machine.storages)
    return value


class _Bounded:
    """A stream that never allocates for a length which only the pickle vouches for."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def read(self, count: int = -1) -> bytes:
        if count > MAX_ARGUMENT_BYTES:
            raise Refused(f"the pickle holds a single value of {count} bytes, which weights never do")
        return self._stream.read(count)

    def readline(self) -> bytes:
        return self._stream.readline(1 << 16)

    def tell(self) -> int:
        return self._stream.tell()


_MARK = object()

_PUSH = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "FLOAT",
    "BINFLOAT",
})  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}


class _Machine:
    """Runs a pickle's opcodes on inert values; with a `Survey` it goes on where it otherwise refuses."""

    def __init__(self, result: Survey | None):
        self.survey = result
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, stream: BinaryIO) -> Any:
        try:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], _Bounded(stream)))):
                if number >= MAX_OPCODES:
                    raise Refused(f"the pickle has more than {MAX_OPCODES} steps, which weights never need")
                if self.survey is not None:
                    self.survey.opcodes += 1
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as exc:
            raise Refused(f"the pickle is damaged or cut short: {str(exc)[:120] or type(exc).__name__}") from exc
        raise Refused("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        else:
            match name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    stack.append(_MARK)
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    self._to_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = stack[-1]
                case "MEMOIZE":
                    self.memo[len(self.memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(self.memo[argument])
                case "TUPLE":
                    stack.append(tuple(self._to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(name[-1])
                    if len(stack) < count:
                        raise IndexError("a tuple of values that are not there")
                    stack[-count:] = [tuple(stack[-count:])]
                case "LIST" | "FROZENSET":
                    stack.append(self._to_mark())
                case "DICT":
                    stack.append({})
                    self._set_items(stack.pop(), self._to_mark(), push=True)
                case "APPEND":
                    value = stack.pop()
                    self._extend(stack[-1], [value])
                case "APPENDS" | "ADDITEMS":
                    values = self._to_mark()
                    self._extend(stack[-1], values)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self._set_items(stack[-1], [key, value])
                case "SETITEMS":
                    values = self._to_mark()
                    self._set_items(stack[-1], values)
                case _:
                    self._object(name, argument)

    def _object(self, name: str, argument: Any) -> None:
        """The opcodes that name, build and call."""
        stack = self.stack
        match name:
            case "GLOBAL":
                stack.append(self._name(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                known = isinstance(module, str) and isinstance(attribute, str)
                stack.append(self._name(module, attribute) if known else self._name("a name made", "at run time"))
            case "INST":
                self._to_mark()
                self._name(*str(argument).split(" ", 1))
                stack.append(self._refuse(f"the pickle makes an object of {argument}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "NEWOBJ_EX":
                del stack[-3:]
                stack.append(self._refuse("the pickle makes objects that are no tensors"))
            case "OBJ":
                self._to_mark()
                stack.append(self._refuse("the pickle makes objects that are no tensors"))
            case "BUILD":
                stack.pop()
                if not isinstance(stack[-1], dict):  # an OrderedDict carries `_metadata`, which weights can do without
                    stack[-1] = self._refuse("the pickle sets the state of an object that is no state dict")
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:  # EXT*, PERSID, BYTEARRAY8, NEXT_BUFFER, READONLY_BUFFER
                if name.startswith("EXT"):
                    self._name("copyreg", f"extension {argument}")
                stack.append(self._refuse(f"the pickle uses {name}, which weights never do"))

    def _to_mark(self) -> list[Any]:
        stack = self.stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                values = stack[place + 1 :]
                del stack[place:]
                return values
        raise IndexError("the end of a group that never began")

    def _refuse(self, message: str) -> Opaque:
        if self.survey is None:
            raise Refused(message)
        return Opaque()

    def _name(self, module: str, attribute: str = "") -> Global:
        name = f"{module}.{attribute}"
        if self.survey is not None:
            self.survey.names.add(name[:200])
        elif name not in ALLOWED:
            raise Refused(f"the pickle asks for {name[:200]}, and weights need no more than tensors")
        return Global(name)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Opaque):
            self._refuse("the pickle appends to what is no list")

    def _set_items(self, target: Any, values: list[Any], *, push: bool = False) -> None:
        if push:
            self.stack.append(target)
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                if not isinstance(key, (str, int, float, bytes, type(None))):  # no hash of a tuple nested without end
                    self._refuse("the pickle has a dict whose keys are neither names nor numbers")
                    continue
                target[key] = value
        elif not isinstance(target, Opaque):
            self._refuse("the pickle sets items of what is no dict")

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, Global) else "what it made itself"
        if name not in CALLS or not isinstance(arguments, tuple):
            return self._refuse(f"the pickle calls {name}, and weights need no more than tensors")
        try:
            return _build(name, arguments)
        except (ValueError, TypeError, LookupError) as exc:
            return self._refuse(f"the pickle calls {name} in a way that makes no tensor: {exc}")

    def _storage(self, identity: Any) -> Any:
        match identity:
            case ("storage", Global(name), str(key), _, int(count)) if count >= 0:
                pass
            case ("storage", Global(name), str(key), _, int(count), None) if count >= 0:
                pass
            case _:
                return self._refuse("the pickle refers to something outside that is no storage of a tensor")
        dtype = STORAGE_DTYPES.get(name.rpartition(".")[2])
        if dtype is None:
            return self._refuse(f"the pickle refers to a {name}, a kind of storage that is not known")
        storage = Storage(key, dtype, count)
        known = self.storages.setdefault(key, storage)
        if known.nbytes != storage.nbytes:
            return self._refuse(f"the pickle gives storage {key:.40} two sizes")
        return storage


def _build(name: str, arguments: tuple[Any, ...]) -> Any:
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "collections.OrderedDict", (list(pairs),):
            return {key: value for key, value in pairs if isinstance(key, str)}
        case "torch.Size", ((list() | tuple()) as sizes,):
            return tuple(sizes)
        case "torch.device", _:
            return Opaque()
        case "torch._utils._rebuild_tensor", (storage, offset, shape, stride):
            return _tensor(storage, None, offset, shape, stride)
        case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, stride, _, _, *_):
            return _tensor(storage, None, offset, shape, stride)
        case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, stride, _, _, Global(dtype), *_):
            return _tensor(storage, TORCH_DTYPES[dtype.removeprefix("torch.")], offset, shape, stride)
        case (
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
            (TensorView() as tensor, _, _, *_),
        ):
            return tensor
    raise ValueError("its arguments are not those of PyTorch")


_ITEM = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def item_bytes(dtype: str) -> int:
    return _ITEM.get(dtype, 1)


def _tensor(storage: Any, dtype: str | None, offset: Any, shape: Any, stride: Any) -> TensorView:
    if not isinstance(storage, Storage):
        raise ValueError("it views no storage")
    numbers = (offset, *shape, *stride)
    if not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers) or len(shape) != len(stride) or len(shape) > 64:
        raise ValueError("its shape, strides and offset are impossible")
    dtype = dtype or storage.dtype
    room = storage.nbytes // item_bytes(dtype)
    empty = 0 in shape
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if not empty and last >= room:
        raise ValueError(f"it reaches element {last} of a storage of {room}")
    return TensorView(storage, dtype, offset, tuple(shape), tuple(stride))
