"""What torch.save wrote, as data: tensors, numbers, text and containers out of a pickle, of which nothing is run or imported.

A pickle may name anything and call it, and other people's checkpoints name classes (Lightning's callbacks, configs). Here every
name but those that put tensors together becomes a stand-in, which takes whatever is done to it and does nothing. A file may
also say that it is larger than it is: what it unpacks to is bounded by its own size, and known before it is unpacked.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ldm.interop.archives import Member, members

OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before 1.6, when they were no zip yet
OPERATIONS, NESTED = 2_000_000, 100  # of a pickle: one of 10,000 tensors has 300,000 and 6
REPEATED = 4  # how many objects there may be for each operation, as some of them are used again
SHARED, SLACK = 8, 2**26  # how often tensors may share what is in the file; and bytes more
STORAGES = {f"{name}Storage": dtype for name, dtype in {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Bool": torch.bool,
    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}.items()}  # fmt: skip
FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # operations
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def read(path: Path) -> tuple[Any, set[str]]:
    """-> the contents of a file, and what the stand-ins among them stand for ("os.system"). Tensors of a zip are mapped into
    memory, those of older files are read.

    Raises:
        pickle.UnpicklingError: whatever is wrong with the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            found = _read_old(file, size) if file.read(len(OLD)) == OLD else _read_zip(path, size)
        return Plain(REPEATED * found.operations + 10_000, SHARED * size + SLACK).of(found.contents), found.met
    except Exception as error:  # a pickle that was written to do harm can fail in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


class Found(NamedTuple):
    """What a pickle holds."""

    contents: Any
    met: set[str]  # what its stand-ins stand for
    operations: int


def _read_zip(path: Path, size: int) -> Found:
    found = members(path, size)
    whole = torch.UntypedStorage.from_file(str(path), False, size)  # a private map: what is written to it stays in memory

    def storage(saved: tuple) -> Storage:
        _, dtype, key, _, count = saved
        member = found[f"data/{key}"]
        numbers = whole[member.start : member.start + _bytes(dtype, count, member.size)]
        if _content(found, "byteorder", whole) == b"big":
            numbers.byteswap(dtype)
        return Storage(numbers, dtype)

    return unpickle(_content(found, "data.pkl", whole), storage)


def _content(found: dict[str, Member], name: str, whole: torch.UntypedStorage) -> bytes:
    member = found.get(name)
    return b"" if member is None else bytes(_view(whole[member.start : member.start + member.size]))


def _read_old(file: BinaryIO, size: int) -> Found:
    """Five pickles, of which the first three say that it is such a file, the fourth is the contents and the fifth lists the
    keys of the storages that follow, each after its count."""
    file.seek(0)
    storages: dict[str, Storage] = {}

    def storage(saved: tuple) -> Storage:
        _, dtype, key, _, count, view = saved
        if key not in storages:
            left = size - sum(known.numbers.nbytes() for known in storages.values())
            storages[key] = Storage(torch.UntypedStorage(_bytes(dtype, count, left)), dtype)
        if view is None:
            return storages[key]
        start, length = (number * dtype.itemsize for number in view[1:])
        return Storage(storages[key].numbers[start : start + length], dtype)

    *_, found, keys = [unpickle(_next(file), storage) for _ in range(5)]
    if set(keys.contents) != set(storages):
        raise ValueError(f"{len(storages)} storages, and {len(keys.contents)} that follow")
    for key in keys.contents:
        numbers, dtype = storages[key]
        count = int.from_bytes(file.read(8), "little")
        if count * dtype.itemsize != numbers.nbytes() or file.readinto(_view(numbers)) != numbers.nbytes():
            raise EOFError(f"storage {key}: its end is missing")
    return found


def _next(file: BinaryIO) -> bytes:
    """The pickle that begins here; the file then stands behind it."""
    start = file.tell()
    for _ in pickletools.genops(file):
        pass
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


def _bytes(dtype: torch.dtype, count: int, most: int) -> int:
    needed = count * dtype.itemsize
    if not 0 <= needed <= most:
        raise ValueError(f"a storage of {needed:,} bytes where there are {most:,}")
    return needed


def _view(numbers: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(numbers).numpy())


# One pickle.


class Storage(NamedTuple):
    """Numbers in a file."""

    numbers: torch.UntypedStorage
    dtype: torch.dtype


class StandIn:
    """What a pickle gets in place of a class or function that it names."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def nothing(self, *args, **kwargs) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = nothing


class Names(dict):
    """In place of OrderedDict, whose instances can be given attributes that hide its methods."""

    def __setstate__(self, *state) -> None:
        pass


def tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    there = storage.numbers.nbytes() // storage.dtype.itemsize
    if min((offset, *size, *stride)) < 0 or offset > there or (0 not in size and last >= there):
        raise ValueError(f"a tensor {tuple(size)} beyond the {there:,} numbers of its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.numbers, offset, size, stride)


def tensor_of(storage: Storage, offset: int, size: tuple, stride: tuple, _grad: Any, _hooks: Any, dtype: torch.dtype,
              *_: Any) -> Tensor:  # fmt: skip
    return tensor(Storage(storage.numbers, dtype), offset, size, stride)


CALLS: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor"): tensor, ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_tensor_v3"): tensor_of,
    ("torch._utils", "_rebuild_parameter"): lambda value, *_: value,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda value, *_: value,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda make, _kind, arguments, *_: make(*arguments),  # it had attributes
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # bytes, in pickles of the second protocol
    ("builtins", "set"): lambda *items: set(*items), ("torch", "Size"): lambda *items: tuple(*items),
}  # fmt: skip


class Unpickler(pickle.Unpickler):
    """Knows what makes tensors and containers. ``met``: whatever else was named."""

    def __init__(self, data: bytes, storage: Callable[[tuple], Storage]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.storage, self.met = storage, set()

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # so it was called by Python 2, and is by its protocol
        if module.startswith("torch") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return Names
        if call := CALLS.get((module, name)):
            return lambda *arguments: call(*arguments)  # a pickle can change what it is given: let it be nobody else's
        self.met.add(f"{module}.{name}")
        return type(str(name), (StandIn,), {"__module__": str(module)})

    def persistent_load(self, saved: Any) -> Storage:
        return self.storage(saved)


def unpickle(data: bytes, storage: Callable[[tuple], Storage]) -> Found:
    operations = count(data)
    unpickler = Unpickler(data, storage)
    return Found(unpickler.load(), unpickler.met, operations)


def count(data: bytes) -> int:
    """-> the operations of a pickle, of which none is carried out. ValueError where it is longer, or nested deeper, than any
    checkpoint: Python itself breaks on tuples in tuples a million deep, as soon as one is a name in a dict."""
    stack: list[int | None] = []  # how deep each object is; None: a mark
    memo: dict[int, int] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        name, taken = operation.name, operation.stack_before
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        elif name in ("MARK", "DUP"):
            stack.append(None if name == "MARK" else stack[-1])
        else:
            items = []
            if pickletools.markobject in taken:
                while (item := stack.pop()) is not None:
                    items.append(item)
                taken = taken[: taken.index(pickletools.markobject)]
            below = [stack.pop() for _ in taken]
            if name in FILLING:  # what is at hand gets something more inside of it
                own, items = below[-1], items + below[:-1]
                deep = max(own, 1 + max(items, default=0))
            else:
                deep = 1 + max(below + items, default=-1)
            if number > OPERATIONS or deep > NESTED:
                raise ValueError("longer or nested deeper than any checkpoint")
            stack += [deep] * len(operation.stack_after)
    return number




class Plain:
    """Copies contents of so many objects at most, and tensors of so many bytes together. A pickle can hold lists in themselves,
    lists in one another that have no end, and tensors that use the same numbers a million times."""

    def __init__(self, objects: int, size: int) -> None:
        self.objects, self.size = objects, size

    def of(self, value: Any, depth: int = 0) -> Any:
        self.objects -= 1
        if self.objects < 0 or depth > NESTED:
            raise ValueError("longer or nested deeper than any checkpoint")
        if isinstance(value, Tensor):
            self.size -= value.numel() * value.itemsize
            if self.size < 0:
                raise ValueError("tensors much larger than the file")
            return value.detach()
        if isinstance(value, dict):
            return {key: self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple, set)):
            return type(value)(self.of(item, depth + 1) for item in value)
        return value
