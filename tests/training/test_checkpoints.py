"""Checkpoints that are refused: no files, more than their bytes can hold, and content of other kinds."""

from __future__ import annotations

import os
import resource
import zipfile

import pytest
import torch
from torchrl.checkpoint import GlobalRNGState

from iql_torchrl.errors import CheckpointError
from iql_torchrl.training.checkpoints import FORMAT, VERSION, load_checkpoint


def content(**changes):
    found = {
        "format": FORMAT,
        "version": VERSION,
        "step": 20,
        "random": GlobalRNGState().state_dict(),
        "training": {"weight": torch.randn(4, 3)},
        "policy": {"weight": torch.randn(4, 3)},
        "architecture": {"hidden_dims": [16, 16]},
        "config": {},
        "dataset_fingerprint": "0" * 64,
        "environment": None,
        **changes,
    }
    return {key: value for key, value in found.items() if value is not ...}


@pytest.fixture
def saved(tmp_path):
    def save(**changes):
        torch.save(content(**changes), tmp_path / "step-00000020.pt")
        return tmp_path / "step-00000020.pt"

    return save


def refusal(path, *words):
    """The message of the error, for which no more than a little memory was taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
    return message


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_whole_one_is_read(saved):
    found = load_checkpoint(saved())
    assert found["step"] == 20 and found["training"]["weight"].shape == (4, 3)


@pytest.mark.parametrize("kind", ["a named pipe", "a device"])
def test_something_else_than_a_file_is_refused_without_being_opened(kind, tmp_path):
    path = tmp_path / "step-00000020.pt"
    if kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    refusal(path, "is not a file", kind)


REPEATED = {
    "repeated numbers": lambda: torch.zeros(1).expand(10**12),
    "rows over each other": lambda: torch.zeros(10).as_strided((10**6, 10**6), (0, 0)),
    "numbers that are nowhere": lambda: torch.zeros(10**6, 10**6, device="meta"),
    "numbers left out": lambda: torch.sparse_coo_tensor(
        torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (10**9, 10**9)
    ),
}


@pytest.mark.parametrize("kind", REPEATED)
@pytest.mark.parametrize("place", ["training", "policy", "random"])
def test_a_tensor_without_its_numbers_is_refused(place, kind, saved):
    refusal(saved(**{place: {"a": [{"b": REPEATED[kind]()}]}}), "is damaged", "without its numbers")


def test_a_call_for_more_than_any_memory_is_refused(saved):
    refusal(saved(config=Call(bytearray, 10**15)), "is damaged")


def test_a_call_of_any_other_function_is_refused_and_not_made(saved, tmp_path):
    refusal(saved(config=Call(os.mkdir, str(tmp_path / "made"))), "could execute code")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_packed_member_is_refused(method, saved):
    path = saved()
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    refusal(path, "is damaged")


@pytest.mark.parametrize("size", [2**31, 2**32 - 2])
def test_a_member_that_says_it_is_larger_than_the_file_is_refused(size, saved):
    path = saved()
    whole = bytearray(path.read_bytes())
    place = whole.index(b"PK\1\2")
    whole[place + 20 : place + 28] = size.to_bytes(4, "little") * 2
    path.write_bytes(whole)
    refusal(path, "is damaged", f"has {len(whole):,}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": torch.zeros(3)}, "is no checkpoint of iql_torchrl"),
        ({"version": torch.zeros(3)}, "has format version tensor"),
        ({"version": "1\n2" * 5000}, "has format version "),
        ({"version": 2}, "has format version 2, this release reads 1"),
        ({"step": "20"}, "step is of type str, not int"),
        ({"training": [1]}, "training is of type list, not Mapping"),
        ({"architecture": None}, "architecture is of type NoneType"),
        ({"policy": ..., "config": ...}, "lacks config, policy"),
    ],
)
def test_content_of_another_kind_is_refused(changes, words, saved):
    refusal(saved(**changes), words)


def test_lists_that_hold_themselves_are_looked_through_once(saved):
    loop = [torch.zeros(2)]
    loop.append(loop)
    assert load_checkpoint(saved(environment=loop))["environment"][1][1][0].shape == (2,)
