"""What wandb has written of a run, read back from its own file."""

import json
import struct

from wandb.proto.wandb_internal_pb2 import Record

# The file is LevelDB's log with a header of its own: blocks, in each fragments of (checksum, length, kind) and content.
_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, struct.Struct("<IHB")
_FIRST_OR_WHOLE, _LAST_OR_WHOLE = (1, 2), (1, 4)


def records(path):
    """The records of a ``.wandb`` file."""
    content, place, whole, found = path.read_bytes(), _FILE_HEADER, b"", []
    assert content.startswith(b":W&B")
    while place + _HEADER.size <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER.size:  # padding
            place += left
            continue
        _, length, kind = _HEADER.unpack_from(content, place)
        fragment = content[place + _HEADER.size : place + _HEADER.size + length]
        whole = fragment if kind in _FIRST_OR_WHOLE else whole + fragment
        if kind in _LAST_OR_WHOLE:
            found.append(Record.FromString(whole))
        place += _HEADER.size + length
    return found


def history(path):
    """The logged rows, in their order."""
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


def summary(path):
    """The values that stand beside the run at its end."""
    found = {}
    for record in records(path):
        for item in record.summary.update:
            found[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


def config(path):
    """The configuration, by the first part of each name."""
    found = {}
    for record in records(path):
        for update in (record.run.config.update, record.config.update):
            found |= {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in update}
    return found
