"""Files written whole or not at all, what killed processes leave, and paths where no file is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from iql_torchrl.atomic import NotAFile, regular_file, remove_leftovers, write_atomically

WRITER = """
import sys, time
from pathlib import Path
from iql_torchrl.atomic import write_atomically

def write(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), write)
"""


@pytest.fixture
def writer():
    """Start a process that is in the middle of writing a file."""
    started = []

    def start(path):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_next_writer_of_a_file_removes_what_a_killed_one_left(writer, tmp_path):
    process = writer(tmp_path / "summary.json")
    kill(process)
    assert names(tmp_path) == [f".summary.json.{process.pid}.tmp"]
    write_atomically(tmp_path / "summary.json", lambda file: file.write(b"whole"))
    assert names(tmp_path) == ["summary.json"]
    assert (tmp_path / "summary.json").read_bytes() == b"whole"


def test_what_a_live_process_is_writing_is_left_alone(writer, tmp_path):
    process = writer(tmp_path / "summary.json")
    write_atomically(tmp_path / "summary.json", lambda file: file.write(b"whole"))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [f".summary.json.{process.pid}.tmp", "summary.json"]


def test_a_file_whose_lock_is_held_is_left_alone_whatever_its_number(writer, tmp_path):
    """As of a process in another container, whose number means nothing here."""
    process = writer(tmp_path / "step-1.pt")
    gone = subprocess.Popen(["true"])
    gone.wait()
    foreign = tmp_path / f".step-1.pt.{gone.pid}.tmp"
    (tmp_path / f".step-1.pt.{process.pid}.tmp").rename(foreign)
    remove_leftovers(tmp_path)
    assert foreign.exists()
    kill(process)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_any_name_in_a_folder_are_removed_and_nothing_else(writer, tmp_path):
    (tmp_path / "below").mkdir()
    processes = [writer(tmp_path / name) for name in ("step-1.pt", "step-2.pt", "below/step-3.pt")]
    for process in processes:
        kill(process)
    others = {".hidden", ".step.tmp", "step-1.pt.99999999.tmp", ".a.x.tmp", ".step-1.pt.tmp"}
    for name in others:
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / ".pipe.99999999.tmp")
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == {*others, "below", ".pipe.99999999.tmp"}
    assert len(names(tmp_path / "below")) == 1


def test_a_leftover_of_this_processs_own_number_is_removed(tmp_path):
    (tmp_path / f".step-1.pt.{os.getpid()}.tmp").write_bytes(b"of the same number in an earlier container")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path):
    remove_leftovers(tmp_path / "gone")


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"before"


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom iql_torchrl.atomic import write_atomically\n"
        "for _ in range(200):\n"
        "    write_atomically(Path(sys.argv[1]), lambda file: file.write(sys.argv[2].encode() * 10_000))\n"
    )
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", code, path, letter]) for letter in "abc"]
    assert [process.wait(120) for process in writers] == [0, 0, 0]
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() in (letter * 10_000 for letter in (b"a", b"b", b"c"))


def place(kind, path):
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as end:
            folder = os.getcwd()
            os.chdir(path.parent)  # its name must be short
            end.bind(path.name)
            os.chdir(folder)
    elif kind == "a device":
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_something_else_than_a_file_is_named_without_being_opened(kind, tmp_path):
    place(kind, tmp_path / "it")
    (tmp_path / "link").symlink_to("it")
    start = time.monotonic()
    for path in (tmp_path / "it", tmp_path / "link"):
        with pytest.raises(NotAFile, match=f"^is {kind}, not a file$"):
            regular_file(path)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", ["gone", "file/below", "x" * 5000, "a\0b"])
def test_a_path_where_nothing_can_be_is_named(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotAFile, match=r"does not exist|cannot be looked at"):
        regular_file(tmp_path / name)


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert regular_file(tmp_path / "link") == tmp_path / "link"
