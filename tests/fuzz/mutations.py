"""Damage and forgery, from a seed: to bytes wherever they are, and to the parts that each format has."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from fuzz.samples import ROWS

Random = random.Random
Mutation = Callable[[Path, Random], None]

NUMBERS = [0, 1, 2, 3, 40, 255, 256, ROWS - 1, ROWS + 1, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 10**12, 2**63 - 1]
VALUES: list[Any] = [
    *(None, True, False, "", "a", "\x00", "\n", "9" * 400, "../..", [], {}, [[]], [None], {"a": 1}, {"type": "Box"}),
    *(-1, 0, 1, 0.5, -0.0, 1e308, 2**31, 2**63, 10**12, 10**30, 10**400, float("nan"), float("inf")),
    *("float32", "object", "torch.float64", "Infinity", "1" * 20, list(range(50)), {"": {"": {"": 0}}}),
]


# ---- bytes


def _edit(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def flip_bits(path: Path, rng: Random) -> None:
    def change(content: bytearray) -> None:
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)

    _edit(path, change)


def overwrite(path: Path, rng: Random) -> None:
    def change(content: bytearray) -> None:
        start, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 4, 8, 64, 512])
        filler = rng.choice([b"\x00", b"\xff", b"\x7f", rng.randbytes(1)])
        content[start : start + length] = rng.choice([filler * length, rng.randbytes(length)])[: len(content) - start]

    _edit(path, change)


def overwrite_number(path: Path, rng: Random) -> None:
    """A hostile number wherever one may be."""

    def change(content: bytearray) -> None:
        size = rng.choice([2, 4, 8])
        place = rng.randrange(max(1, len(content) // 2)) * 2
        content[place : place + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, rng.choice(["little", "big"]))

    _edit(path, change)


def forge_rows(path: Path, rng: Random) -> None:
    """Another number of rows, wherever it stands as an integer of some bytes, a varint or a text."""

    def change(content: bytearray) -> None:
        number = rng.choice(NUMBERS)
        forms = [struct.pack("<Q", ROWS), struct.pack("<I", ROWS), _varint(2 * ROWS), str(ROWS).encode()]
        forged = [
            struct.pack("<Q", number),
            struct.pack("<I", number % 2**32),
            _varint(2 * number),
            str(number).encode(),
        ]
        found = [
            (match.start(), kind) for kind, form in enumerate(forms) for match in re.finditer(re.escape(form), content)
        ]
        if found:
            place, kind = rng.choice(found)
            content[place : place + len(forms[kind])] = forged[kind]

    _edit(path, change)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def truncate(path: Path, rng: Random) -> None:
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, 8, rng.randrange(size + 1), rng.randrange(size + 1), max(0, size - 1)]))


def insert(path: Path, rng: Random) -> None:
    def change(content: bytearray) -> None:
        place = rng.randrange(len(content) + 1)
        content[place:place] = rng.randbytes(rng.choice([1, 2, 8, 100]))

    _edit(path, change)


def remove(path: Path, rng: Random) -> None:
    def change(content: bytearray) -> None:
        place = rng.randrange(len(content) + 1)
        del content[place : place + rng.choice([1, 2, 8, 100])]

    _edit(path, change)


def repeat(path: Path, rng: Random) -> None:
    def change(content: bytearray) -> None:
        start, place = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)
        content[place:place] = content[start : start + rng.choice([8, 64, 512])] * rng.choice([1, 2, 50])

    _edit(path, change)


def append(path: Path, rng: Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100, 5000])))


def lengthen_by_a_hole(path: Path, rng: Random) -> None:
    os.truncate(path, path.stat().st_size + rng.choice([1, 2**20, 2**34, 2**41]))


BYTES: list[Mutation] = [
    *(flip_bits, flip_bits, overwrite, overwrite_number, overwrite_number, forge_rows, truncate, insert, remove),
    *(repeat, append, lengthen_by_a_hole),
]


# ---- something else than a file


def replace_by_something_else(path: Path, rng: Random) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    kind = rng.choice(["pipe", "socket", "device", "folder", "nothing", "loop", "empty", "pipe by a link"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "pipe by a link":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "socket":
        folder = Path.cwd()
        os.chdir(path.parent)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
        os.chdir(folder)
    elif kind == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full"]))
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.touch()


# ---- HDF5

HDF5_KINDS = [
    *(
        "never written",
        "chunks never written",
        "huge chunks",
        "grown",
        "bomb",
        "wide",
        "deep",
        "type",
        "link",
        "outside",
    ),
    *("virtual", "group", "empty", "scalar", "filled", "attribute", "contiguous"),
]


def forge_hdf5(path: Path, rng: Random) -> None:
    """Another thing in place of a dataset of a healthy file."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, found: names.append(name) if isinstance(found, h5py.Dataset) else None)
        for name in rng.sample(names, rng.choice([1, 1, 2, len(names)])):
            _forge_dataset(file, name, rng, path)


def _forge_dataset(file: h5py.File, name: str, rng: Random, path: Path) -> None:
    old = file[name]
    shape, dtype, values = old.shape, old.dtype, old[()]
    del file[name]
    rows = rng.choice([*NUMBERS, 2**31, 10**12])
    forged = (min(rows, 2**62), *shape[1:])
    kind = rng.choice(HDF5_KINDS)
    if kind == "never written":
        _create(file, name, dtype, forged)
    elif kind == "chunks never written":
        _create(file, name, dtype, forged, chunks=(min(1024, max(1, forged[0])), *[max(1, n) for n in shape[1:]]))
    elif kind == "huge chunks":
        chunk = rng.choice([2**20, 2**26, 2**29])
        _create(file, name, dtype, (len(values), *shape[1:]), chunks=(chunk, *shape[1:]), maxshape=(None, *shape[1:]))
        if rng.random() < 0.3 and chunk == 2**20:
            file[name][...] = values
    elif kind == "grown":
        file.create_dataset(name, data=values, maxshape=(None, *shape[1:]), chunks=(50, *shape[1:]), compression="gzip")
        file[name].resize(forged[0] or 1, axis=0)
    elif kind == "bomb":
        big = (rng.choice([2**20, 2**22]), *shape[1:])
        file.create_dataset(name, data=np.zeros(big, dtype), compression="gzip", chunks=(2**18, *shape[1:]))
    elif kind == "wide":
        _create(file, name, dtype, (len(values), rng.choice([0, 1, 10**6, 2**31, 2**40])))
    elif kind == "deep":
        file.create_dataset(name, data=values.reshape(-1), shape=(1,) * rng.choice([2, 5, 20]) + (values.size,))
    elif kind == "type":
        kinds = ["f2", "f8", ">f4", "i1", "u8", "c8", "S1", "S40", "V4", h5py.string_dtype(), h5py.vlen_dtype("f4")]
        odd = rng.choice([*kinds, h5py.ref_dtype, np.dtype([("a", "f4"), ("b", "i8")]), h5py.enum_dtype({"A": 0})])
        _create(file, name, odd, shape)
    elif kind == "link":
        targets = [f"/{name}", "/", "/rewards", "/gone", "/data", "."]
        file[name] = h5py.SoftLink(rng.choice(targets))
    elif kind == "outside":
        file[name] = h5py.ExternalLink(rng.choice([path.name, "gone.hdf5", "/dev/zero"]), f"/{name}")
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape=shape, dtype=dtype)
        layout[...] = h5py.VirtualSource(rng.choice([".", "gone.hdf5"]), name, shape=shape)
        file.create_virtual_dataset(name, layout)
    elif kind == "group":
        file.create_group(name)
    elif kind == "empty":
        file[name] = h5py.Empty("f4")
    elif kind == "scalar":
        file[name] = values.reshape(-1)[0]
    elif kind == "filled":
        file.create_dataset(
            name, shape=shape, dtype="f4", fillvalue=rng.choice([np.nan, np.inf, -1, 1e30]), chunks=shape
        )
    elif kind == "contiguous":
        file[name] = np.full(shape, rng.choice([0, 1]), dtype)
    else:
        file[name] = values
        owner = file[name].parent
        for key in ("num_samples", "total_steps", "env_id", "env_args", "seed"):
            if rng.random() < 0.6:
                value = rng.choice(
                    [-1, 0, 10**12, 2**62, 0.5, float("nan"), "x", "{}", "[" * 500, np.arange(9), b"\xff"]
                )
                owner.attrs[key] = value


def _create(file: h5py.File, name: str, dtype: Any, shape: tuple[int, ...], **options: Any) -> None:
    try:
        file.create_dataset(name, shape=shape, dtype=dtype, **options)
    except (ValueError, OSError, OverflowError):  # h5py makes no such thing
        file[name] = np.zeros(3, "f4")


# ---- NumPy


def _header(rng: Random) -> bytes:
    """The beginning of an .npy file that may say anything."""
    count = rng.choice(NUMBERS)
    shape = rng.choice([f"({count},)", f"({ROWS}, {count})", f"({count}, 3)", f"(-{count},)", "()", f"({ROWS},)", "x"])
    kind = rng.choice(
        ["<f4", "|b1", "<f8", "|O", "<U100000", "|S4294967295", "<M8[s]", "|V0", "x", "<f2", ">i8", "<c16"]
    )
    order = rng.choice(["False", "True", "1", "None"])
    text = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = rng.choice([text] * 8 + ["(" * 3000, "9" * 9000, text[: len(text) // 2], "{" + "'a':{" * 80])
    version = rng.choice([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)])
    length = len(text) + 1
    size = struct.pack("<H" if version == (1, 0) else "<I", rng.choice([length] * 6 + [length + 1, 2**16 - 1]))
    return b"\x93NUMPY" + bytes(version) + size + text.encode() + b"\n"


def forge_npy(path: Path, rng: Random) -> None:
    def change(content: bytearray) -> None:
        content[:128] = _header(rng)

    _edit(path, change)


def forge_npz(path: Path, rng: Random) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for name in rng.sample(sorted(members), rng.choice([0, 1, 1, 2])):
        kind = rng.choice(["header", "cut", "bomb", "gone", "text", "nested", "wrong"])
        if kind == "header":
            members[name] = _header(rng) + members[name][128:]
        elif kind == "cut":
            members[name] = members[name][: rng.randrange(len(members[name]))]
        elif kind == "bomb":
            stream = io.BytesIO()
            np.save(stream, np.zeros(rng.choice([2**20, 2**24]), "f4"))
            members[name] = stream.getvalue()
        elif kind == "gone":
            del members[name]
        elif kind == "text":
            members[name] = b"0.5, 0.25"
        elif kind == "nested":
            members[name] = path.read_bytes()
        else:
            stream = io.BytesIO()
            wrong = [np.zeros(ROWS, "U3"), np.zeros(ROWS, "c8"), np.zeros((ROWS, 2, 2)), np.array(5), np.zeros((0, 3))]
            np.save(stream, rng.choice(wrong))
            members[name] = stream.getvalue()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(rng.choice([name] * 20 + ["../x.npy", "observations", "rewards.npy"]), content)
    if rng.random() < 0.5:
        forge_zip(path, rng)


def forge_zip(path: Path, rng: Random) -> None:
    """Another size, method or offset in a zip's directory."""

    def change(content: bytearray) -> None:
        entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
        if not entries:
            return
        for entry in rng.sample(entries, min(len(entries), rng.choice([1, 2, len(entries)]))):
            place, size = rng.choice([(10, 2), (8, 2), (16, 4), (20, 4), (24, 4), (24, 4), (28, 2), (30, 2), (42, 4)])
            number = rng.choice([*NUMBERS, 0xFFFFFFFF])
            content[entry + place : entry + place + size] = (number % 256**size).to_bytes(size, "little")

    _edit(path, change)


# ---- Parquet


def forge_parquet(path: Path, rng: Random) -> None:
    """A healthy file of another table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    rows = table.num_rows
    long = rng.choice([2**10, 2**24, 2**25])
    columns: list[Callable[[], pa.Array]] = [
        lambda: pa.array(["a"] * rows).dictionary_encode(),
        lambda: pa.array([[0.5] * 3] * (rows - 1) + [[0.5] * rng.choice([0, 2, 4])]),
        lambda: pa.array([None] * rows),
        lambda: pa.array([None, *([0.5] * (rows - 1))]),
        lambda: pa.array([[[0.5]]] * rows),
        lambda: pa.array([{"x": 1}] * rows),
        lambda: pa.array([float("nan")] * rows),
        lambda: pa.array([10**6 * 5] * rows),
        lambda: pa.array([2] * rows, pa.uint8()),
        lambda: pa.nulls(rows, pa.list_(pa.float32(), rng.choice([0, 3, 10**4]))),
        lambda: pa.array([1] * rows, pa.decimal128(10, 2)),
        lambda: pa.array([0] * rows, pa.timestamp("us")),
        lambda: pa.ListArray.from_arrays(
            pa.array([0] + [long] * rows, pa.int32()), pa.array(np.zeros(long, np.float32))
        ),
        lambda: pa.array([b"x"] * rows),
        lambda: pa.array([True] * rows),
        lambda: pa.array([2**62] * rows),
    ]
    index = table.column_names.index(name)
    if rng.random() < 0.85:
        table = table.set_column(index, name, rng.choice(columns)())
    else:
        others = ["observations_999999", "observations_00", "rewards", "actions_0", "a\nb", "", "observations." * 3]
        table = table.rename_columns([rng.choice(others) if one == name else one for one in table.column_names])
    options = {"compression": rng.choice(["none", "snappy", "gzip", "zstd"]), "version": rng.choice(["1.0", "2.6"])}
    pq.write_table(table, path, row_group_size=rng.choice([1, 10, 100, 10**6]), **options)
    if rng.random() < 0.4:
        rng.choice([forge_parquet_footer, forge_rows, flip_bits])(path, rng)


def forge_parquet_footer(path: Path, rng: Random) -> None:
    """Damage where the counts are: in the footer, or in the length of it."""

    def change(content: bytearray) -> None:
        if len(content) < 12:
            return
        length = int.from_bytes(content[-8:-4], "little")
        start = max(0, len(content) - 8 - length)
        if rng.random() < 0.15:
            content[-8:-4] = (rng.choice(NUMBERS) % 2**32).to_bytes(4, "little")
            return
        for _ in range(rng.choice([1, 1, 2, 4])):
            place = rng.randrange(start, len(content) - 8)
            content[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])

    _edit(path, change)


# ---- JSON


def forge_json(path: Path, rng: Random) -> None:
    """Another value somewhere, also within texts that are JSON themselves."""
    content = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 3])):
        content = _forged(content, rng)
    text = json.dumps(content)
    if rng.random() < 0.05:
        text = rng.choice(["[" * 100_000, '{"a":' * 5000, text[: len(text) // 2], "null", "[]", "3", '"x"', "", "\xff"])
    path.write_text(text)


def _forged(content: Any, rng: Random) -> Any:
    if isinstance(content, dict) and content and rng.random() < 0.95:
        key = rng.choice(list(content))
        changed = dict(content)
        kind = rng.random()
        if kind < 0.06:
            del changed[key]
        elif kind < 0.1:
            changed[rng.choice(["", "..", "a/b", "x" * 300])] = changed.pop(key)
        else:
            changed[key] = _forged(changed[key], rng)
        return changed
    if isinstance(content, list) and content and rng.random() < 0.6:
        place = rng.randrange(len(content))
        return [*content[:place], _forged(content[place], rng), *content[place + 1 :]]
    if isinstance(content, str) and content[:1] == "{" and rng.random() < 0.9:
        return json.dumps(_forged(json.loads(content), rng))
    if rng.random() < 0.06:
        return _space(rng)
    return rng.choice(VALUES)


def _space(rng: Random) -> Any:
    """The description of a space that is too deep or too large."""
    deep: dict[str, Any] = {"type": "Discrete", "dtype": "int64", "start": 0, "n": 4}
    for _ in range(rng.choice([3, 60, 400])):
        deep = {"type": "Dict", "subspaces": {"a": deep}}
    count = rng.choice(NUMBERS)
    wide = {"type": "Box", "dtype": "float32", "shape": [count], "low": 0.0, "high": 1.0}
    discrete = {"type": "Discrete", "dtype": "int64", "start": rng.choice([0, -1, 2**62]), "n": count}
    several = {"type": "MultiDiscrete", "dtype": "int64", "nvec": [count, 2], "start": [0, 0]}
    binary = {"type": "MultiBinary", "n": rng.choice([count, [count, count]])}
    chosen = rng.choice([deep, wide, discrete, several, binary, {"type": "Tuple", "subspaces": [wide, discrete]}])
    return rng.choice([chosen, json.dumps(chosen)])


def forge_metadata(path: Path, rng: Random) -> None:
    """A Minari dataset's spaces and counts."""
    content = json.loads(path.read_text())
    key = rng.choice(["observation_space", "action_space", "total_steps", "total_episodes", "data_format", "env_spec"])
    if key.endswith("space"):
        text = _space(rng)
        content[key] = text if isinstance(text, str) else json.dumps(text)
    else:
        content[key] = rng.choice([*NUMBERS, *VALUES, "arrow", "parquet", "hdf5"])
    path.write_text(json.dumps(content))


# ---- YAML


def forge_yaml(path: Path, rng: Random) -> None:
    text = path.read_text()
    lines = text.splitlines()
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(lines) + 1)
        kind = rng.choice(["line", "value", "value", "key", "gone", "indent", "swap", "end"])
        odd = rng.choice(YAML)()
        if kind == "line":
            lines.insert(place, odd)
        elif kind == "end":
            lines.append(odd)
        elif lines and place < len(lines):
            line = lines[place]
            if kind == "value":
                lines[place] = f"{line.partition(':')[0]}: {rng.choice(YAML_VALUES)()}"
            elif kind == "key":
                rest = line.partition(":")[2]
                lines[place] = (
                    f"{rng.choice(['1', '~', 'on', '[a]', '!!int 3', '<<', '=', '*x', '&x a', '0x1f'])}:{rest}"
                )
            elif kind == "gone":
                del lines[place]
            elif kind == "indent":
                lines[place] = " " * rng.randrange(8) + line.lstrip()
            else:
                other = rng.randrange(len(lines))
                lines[place], lines[other] = lines[other], lines[place]
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")


YAML_VALUES: list[Callable[[], str]] = [
    *(
        (lambda text=text: text)
        for text in ("null", "[]", "{}", "-1", "1e400", ".nan", ".inf", "true", "2020-01-01", "''")
    ),
    *(
        (lambda text=text: text)
        for text in ("${a}", "${data.seed}", "${..x}", "${", "${oc.env:HOME}", "${x:y}", "???", "=")
    ),
    *(
        (lambda text=text: text)
        for text in ("!!set {a, b}", "!!binary aGVsbG8=", "!!python/name:os.system", "!x y", "*a")
    ),
    *(
        (lambda text=text: text)
        for text in ("&a [*a]", "[1, [2, [3]]]", "{a: {b: c}}", "1:30:00", "0b11", "0o7", "1_000")
    ),
    *(
        (lambda text=text: text)
        for text in ("${algorithm}", "${actor.optim}", "[${data.seed}]", "a: b", "| ", "'", '"\\x1b"')
    ),
    lambda: "[" * 60 + "]" * 60,
    lambda: "9" * 5000,
    lambda: "0x" + "f" * 4000,
    lambda: "1" + ":1" * 20_000,
    lambda: "x" * 10_000,
    lambda: "[" * 5000,
]
YAML: list[Callable[[], str]] = [
    lambda: "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(9)),
    lambda: "\n".join(f"b{i}: ${{b{i + 1}}}${{b{i + 1}}}" for i in range(40)) + "\nb40: x\ndata: {task_name: '${b0}'}",
    lambda: "\n".join(f"{'  ' * i}k:" for i in range(80)),
    lambda: "---",
    lambda: "%YAML 9.9",
    lambda: "%TAG ! tag:x,2000:",
    lambda: "\t- x",
    lambda: "? [a]\n: 1",
    lambda: "? !!set {a}\n: 1",
    lambda: "<<: {a: 1}",
    lambda: "data.seed: 4",
    lambda: "\n".join(f"k{i}: {i}" for i in range(3000)),
    lambda: "runner: {log_interval: x, max_steps: []}",
    lambda: "algorithm: 5",
    lambda: "actor: [1]",
    lambda: "x: \x07",
    lambda: "long: '" + "y" * 1_000_000 + "'",
]


# ---- checkpoints


class _Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def forge_checkpoint(path: Path, rng: Random) -> None:
    """Other content, written by torch.save."""
    import torch

    content = torch.load(path, weights_only=True)
    tensor = torch.randn(3)
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = 0
    for _ in range(rng.choice([10, 400])):
        deep = [deep]
    values = [
        *VALUES,
        *(loop, deep, tensor, tensor[:1].expand(10**12), tensor.to("meta"), torch.zeros(3, 4).to_sparse()),
        torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (10**9, 10**9)),
        *(_Call(bytearray, 10**12), _Call(bytearray, 2**30), _Call(os.getpid), _Call(eval, "1"), {1, 2}, (tensor,) * 5),
        *(torch.nn.Linear(2, 2), np.zeros(3), torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), b"x", 1j),
    ]
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(content))
        if rng.random() < 0.1:
            del content[key]
        elif rng.random() < 0.1:
            content[rng.choice([0, None, (1, 2), "x"])] = rng.choice(values)
        else:
            content[key] = rng.choice(values)
    torch.save(rng.choice([content] * 9 + [[content], tensor, None]), path)


def forge_pickle(path: Path, rng: Random) -> None:
    """Damage to the pickle within the zip, whose sums are right."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    if rng.random() < 0.3:
        name = rng.choice(sorted(members))
    inner = path.with_name("inner")
    inner.write_bytes(members[name])
    if members[name]:
        rng.choice([flip_bits, overwrite, overwrite_number, truncate, insert, remove, repeat])(inner, rng)
    members[name] = inner.read_bytes()
    if rng.random() < 0.05:
        members[name] = pickle.dumps(_Call(os.getpid))
    inner.unlink()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    if rng.random() < 0.2:
        forge_zip(path, rng)


def forge_tensor_sizes(path: Path, rng: Random) -> None:
    """Another shape or number of elements of a tensor, in the pickle."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    content = members[name]
    places = [match.start() for match in re.finditer(rb"K\x10|M\x00\x01", content)]  # 16, and 256 = 16 * 16
    for place in rng.sample(places, min(len(places), rng.choice([1, 2, 6, len(places)]))):
        old = content[place : place + (2 if content[place : place + 1] == b"K" else 3)]
        fits = rng.choice([b"\x00", b"\x01", b"\xff"]) if len(old) == 2 else rng.choice([b"\x00\x00", b"\xff\xff"])
        content = content[: place + 1] + fits + content[place + len(old) :]
    big = b"\x8a\x06" + rng.choice([10**12, 2**40, -(2**40), 2**46]).to_bytes(6, "little", signed=True)
    if rng.random() < 0.5 and places:
        place = rng.choice(places)
        content = content[:place] + big + content[place + (2 if content[place : place + 1] == b"K" else 3) :]
    members[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for member, value in members.items():
            archive.writestr(member, value)
