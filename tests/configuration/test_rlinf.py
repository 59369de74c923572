"""Files that ``rlinf=FILE`` refuses: larger, deeper or richer than any configuration, or no files at all."""

from __future__ import annotations

import os
import time

import pytest

from iql_torchrl.configuration.rlinf import read_overrides
from iql_torchrl.errors import ConfigurationError

PLAIN = "data:\n  task_name: hopper-medium-v2\n  seed: 3\n"


def refusal(path, *words):
    """The message of the error, which comes at once."""
    start = time.monotonic()
    with pytest.raises(ConfigurationError) as error:
        read_overrides(path)
    assert time.monotonic() - start < 10
    message = str(error.value)
    assert message.startswith(f"rlinf={path}") and "\n" not in message and len(message) < 500
    for word in words:
        assert word in message
    return message


def written(folder, text):
    (folder / "theirs.yaml").write_text(text)
    return folder / "theirs.yaml"


REFUSED = {
    "an alias": (f"a: &a [1]\nb: *a\n{PLAIN}", "line 2 refers to another place with *a"),
    "aliases that multiply": (
        "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)) + f"\n{PLAIN}",
        "refers to another place with *a0",
    ),
    "a set": (f"a: !!set {{x, y}}\n{PLAIN}", "line 1 has the tag tag:yaml.org,2002:set"),
    "bytes": (f"a: !!binary aGVsbG8=\n{PLAIN}", "the tag tag:yaml.org,2002:binary"),
    "an object": (f"a: !!python/object/apply:os.getpid []\n{PLAIN}", "the tag tag:yaml.org,2002:python/object/apply"),
    "a path": (f"a: !!python/object/apply:pathlib.Path [x]\n{PLAIN}", "the tag tag:yaml.org,2002:python/object"),
    "a tag of its own": (f"a: !mine x\n{PLAIN}", "line 1 has the tag !mine"),
    "lists in lists": (f"{PLAIN}a: {'[' * 60}{']' * 60}\n", "line 4 is nested deeper than 50 levels"),
    "lists in lists without an end": ("[" * 100_000, "is nested deeper than 50 levels"),
    "sections in sections": ("\n".join(f"{' ' * i}a:" for i in range(60)), "is nested deeper than 50 levels"),
    "a number as a key": (f"1: 2\n{PLAIN}", "line 1 has a key that is no text, 1"),
    "a switch as a key": (f"on: 2\n{PLAIN}", "has a key that is no text, on"),
    "nothing as a key": (f"~: 2\n{PLAIN}", "has a key that is no text, ~"),
    "a list as a key": (f"? [a]\n: 1\n{PLAIN}", "has a key that is no text, but a collection"),
    "a merged section": (f"<<: {{a: 1}}\n{PLAIN}", "has a key that is no text, <<"),
    "a long number": (f"{PLAIN}a: {'9' * 4000}\n", "line 4 has a number of 4,000 characters"),
    "a long sum of sixties": (f"{PLAIN}a: 1{':1' * 1000}\n", "has a number of 2,001 characters"),
    "a long text": (f"{PLAIN}a: {'x' * 5000}\n", "has a value of 5,000 characters"),
    "references that multiply": (
        "\n".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}" for i in range(40)) + "\na40: x\ndata: {task_name: '${a0}'}\n",
        "its interpolations, ${...}, may multiply",
    ),
    "a reference to itself": ("data: {task_name: '${data.task_name}'}\n", "data.task_name cannot be resolved"),
    "a chain of references": (
        "\n".join(f"a{i}: ${{a{i + 1}}}" for i in range(3000)) + "\na3000: x\ndata: {task_name: '${a0}'}\n",
        "data.task_name cannot be resolved",
    ),
    "two documents": (f"{PLAIN}---\n{PLAIN}", "cannot be read as YAML"),
    "a control character": (f"{PLAIN}a: \x07\n", "cannot be read as YAML"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_configuration_file_has_is_refused_with_its_place(kind, tmp_path):
    text, words = REFUSED[kind]
    refusal(written(tmp_path, text), words)


def test_a_file_of_more_than_a_megabyte_is_refused_by_its_size(tmp_path):
    path = written(tmp_path, PLAIN)
    os.truncate(path, 2**40)
    refusal(path, "has 1,099,511,627,776 bytes, more than the 1,000,000")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    refusal(path, "cannot be read as YAML")


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a folder"])
def test_something_else_than_a_file_is_refused_without_being_opened(kind, tmp_path):
    path = tmp_path / "theirs.yaml"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    refusal(path, f"is {kind}, not a file")


def test_a_missing_file_is_named(tmp_path):
    refusal(tmp_path / "gone.yaml", "gone.yaml is not a file;")


@pytest.mark.parametrize(
    ("text", "option", "expected"),
    [
        (PLAIN, "train.seed", 3),
        (f"{PLAIN}name: &unused x\n", "train.seed", 3),
        (f"{PLAIN}runner: {{max_steps: !!int '20'}}\n", "train.steps", 20),
        (f"{PLAIN}runner: {{max_steps: '${{data.seed}}'}}\n", "train.steps", 3),
        ("folder: logs\ndata: {dataset_path: '${folder}/${name}.hdf5'}\nname: a\n", "dataset.path", "logs/a.hdf5"),
        (f"{PLAIN}runner: {{log_interval: often}}\n", "train.log_interval", "often"),
        (f"{PLAIN}runner: {{log_interval: [1]}}\n", "train.log_interval", [1]),
        (f"{PLAIN}runner: {{max_steps: 50, save_interval: -1}}\n", "checkpoint.interval", 50),
    ],
)
def test_plain_files_are_read(text, option, expected, tmp_path):
    assert read_overrides(written(tmp_path, text))[0][option] == expected


def test_ten_thousand_keys_are_read_in_seconds(tmp_path):
    text = PLAIN + "".join(f"key{number}: {number}\n" for number in range(10_000))
    path = written(tmp_path, text)
    start = time.monotonic()
    options, ignored = read_overrides(path)
    assert options["train.seed"] == 3 and len(ignored) == 10_000
    assert time.monotonic() - start < 60
