"""Downloads from a real server on the loopback interface that breaks off, stalls, lies, and changes its file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from iql_torchrl import load_transitions
from iql_torchrl.data import download as module
from iql_torchrl.data.download import Downloaded, DownloadError, download
from iql_torchrl.errors import DatasetError

NAME = "hopper-medium-v2"
BODY = np.random.default_rng(0).bytes(10_000)
OTHER = np.random.default_rng(1).bytes(10_000)
MONDAY, TUESDAY = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"


class Server:
    """A file with its versions, byte ranges and If-Range.

    ``faults`` are what is wrong with the answers to come, one after the other, and ``always`` with every further one:

    - ``status``: an error instead of the file
    - ``cut``: the connection is closed after so many bytes of the body; ``reset``: in the rude way
    - ``stall``: nothing comes after so many bytes of the body until the server closes; ``delay``: seconds before it
    - ``length``: announced beyond the real length, ``chunked``: no length but chunks, ``unknown``: neither
    - ``start``, ``total``: in Content-Range, beyond the real ones; ``total="*"``
    - ``before``: called first
    """

    def __init__(self):
        self.body, self.etag, self.modified = BODY, '"one"', None
        self.ranges = self.honours_if_range = True
        self.faults, self.always = [], {}
        self.requests = []
        self.closing = threading.Event()
        self.port = None
        self._server = None
        self.start()

    @property
    def sent_ranges(self):
        return [headers.get("Range") for headers in self.requests]

    def address(self, path="/file.hdf5"):
        return f"http://127.0.0.1:{self.port}{path}"

    def start(self):
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.requests.append(dict(self.headers))
                self.close_connection = True
                site.answer(self, site.faults.pop(0) if site.faults else site.always)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # clients that went away

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self):
        self.closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def close_soon(self):
        """Take no further connection, from within an answer."""
        self._server.socket.close()

    def answer(self, handler, fault):
        fault.get("before", lambda: None)()
        self.closing.wait(fault.get("delay", 0))
        if "status" in fault:
            self._head(handler, fault["status"], {"Content-Length": 5, "Accept-Ranges": "bytes"})
            handler.wfile.write(b"sorry")
            return
        body, start, status = self.body, 0, 200
        headers = {"ETag": self.etag, "Last-Modified": self.modified}
        wanted = handler.headers.get("Range")
        if self.ranges:
            headers["Accept-Ranges"] = "bytes"
            known = handler.headers.get("If-Range")
            strong = self.etag if self.etag and not self.etag.startswith("W/") else None
            if wanted and (known is None or not self.honours_if_range or known in (strong, self.modified)):
                start, status = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
        if status == 206 and start >= len(body):
            self._head(handler, 416, {"Content-Length": 0, "Content-Range": f"bytes */{len(body)}"})
            return
        if status == 206:
            total = fault.get("total", 0)
            total = total if total == "*" else len(body) + total
            headers["Content-Range"] = f"bytes {start + fault.get('start', 0)}-{len(body) - 1}/{total}"
        body = body[start:]
        if fault.get("chunked"):
            headers["Transfer-Encoding"] = "chunked"
        elif not fault.get("unknown"):
            headers["Content-Length"] = len(body) + fault.get("length", 0)
        self._head(handler, status, headers)
        sent = body[: min(fault.get("cut", len(body)), fault.get("stall", len(body)))]
        if fault.get("chunked"):
            for at in range(0, len(sent), 3000):
                piece = sent[at : at + 3000]
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if len(sent) == len(body):
                handler.wfile.write(b"0\r\n\r\n")
        else:
            handler.wfile.write(sent)
        handler.wfile.flush()
        if "stall" in fault:
            self.closing.wait(60)
        if fault.get("reset"):
            time.sleep(0.05)  # what was sent is read before the reset throws it away
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    @staticmethod
    def _head(handler, status, headers):
        handler.send_response(status)
        for key, value in headers.items():
            if value is not None:
                handler.send_header(key, str(value))
        handler.send_header("Connection", "close")
        handler.end_headers()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "BACK_OFF", 0.001)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "file"


def fetch(server, path, **options):
    return download(server.address(), path, **{"label": "it", "timeout": 5.0, **options})


def beside(path):
    return sorted(file.name for file in path.parent.iterdir())


def assert_arrived(path, body, found):
    assert path.read_bytes() == body
    assert found == Downloaded(len(body), hashlib.sha256(body).hexdigest())
    assert beside(path) == [path.name]


PARTIAL = ["file.partial", "file.partial.json"]


# ---- whole transfers


@pytest.mark.parametrize("fault", [{}, {"chunked": True}, {"unknown": True}], ids=["length", "chunked", "neither"])
@pytest.mark.parametrize("size", [0, 1, 10_000, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_file_arrives_in_one_request_whatever_its_size_and_however_it_is_announced(size, fault, server, path):
    server.body, server.always = np.random.default_rng(size).bytes(size), fault
    assert_arrived(path, server.body, fetch(server, path))
    assert server.sent_ranges == [None]


def test_an_older_file_is_replaced(server, path):
    path.write_bytes(b"older")
    assert_arrived(path, BODY, fetch(server, path))


def test_an_older_file_stays_when_the_download_fails(server, path):
    path.write_bytes(b"older")
    server.always = {"status": 404}
    with pytest.raises(DownloadError):
        fetch(server, path)
    assert path.read_bytes() == b"older" and beside(path) == ["file"]


def test_a_local_file_is_copied(tmp_path, path):
    source = tmp_path / "source"
    source.write_bytes(BODY)
    assert_arrived(path, BODY, download(source.as_uri(), path, label="it"))
    assert source.read_bytes() == BODY


# ---- resumed in one process


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("cut", [1, 4000, 9999])
def test_a_broken_transfer_goes_on_where_it_broke(cut, reset, server, path):
    server.faults = [{"cut": cut}] if not reset else [{"cut": cut, "reset": True}]
    assert_arrived(path, BODY, fetch(server, path))
    assert len(server.requests) == 2 and server.sent_ranges[0] is None
    if not reset:  # a reset may throw away what was sent
        assert server.sent_ranges[1] == f"bytes={cut}-" and server.requests[1]["If-Range"] == '"one"'


def test_three_breaks_are_survived_each_from_where_it_broke(server, path):
    server.faults = [{"cut": 4000}, {"cut": 1000}, {"cut": 2500}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-", "bytes=5000-", "bytes=7500-"]


def test_a_break_in_the_headers_or_before_the_first_byte_starts_again(server, path):
    server.faults = [{"cut": 0}, {"status": 503}, {"cut": 0}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None] * 4


def test_a_server_that_names_only_the_date_of_its_file_is_resumed_by_it(server, path):
    server.etag, server.modified, server.faults = None, MONDAY, [{"cut": 4000}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-"] and server.requests[1]["If-Range"] == MONDAY


def test_a_weak_tag_is_not_taken_for_a_version_but_the_date_beside_it_is(server, path):
    server.etag, server.modified, server.faults = 'W/"one"', MONDAY, [{"cut": 4000}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-"] and server.requests[1]["If-Range"] == MONDAY


@pytest.mark.parametrize(
    ("etag", "ranges"), [('W/"one"', True), (None, True), ('"one"', False)], ids=["weak tag", "no version", "no ranges"]
)
def test_a_server_that_cannot_resume_is_asked_for_the_whole_file_again(etag, ranges, server, path):
    server.etag, server.ranges, server.faults = etag, ranges, [{"cut": 4000}, {"cut": 6000}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None] * 3


def test_a_cut_chunked_transfer_never_passes_for_a_whole_one(server, path):
    server.faults = [{"chunked": True, "cut": 6000}]
    assert_arrived(path, BODY, fetch(server, path))
    assert len(server.requests) == 2


def test_a_rest_in_chunks_is_appended(server, path):
    server.faults = [{"cut": 4000}, {"chunked": True}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-"]


def test_a_rest_whose_total_is_not_told_is_appended(server, path):
    server.faults = [{"cut": 4000}, {"total": "*"}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-"]


@pytest.mark.parametrize("stall", [0, 4000])
def test_a_stall_beyond_the_timeout_ends_an_attempt_and_another_gets_the_file(stall, server, path):
    server.faults = [{"stall": stall}]
    assert_arrived(path, BODY, fetch(server, path, timeout=0.2))
    assert len(server.requests) == 2


def test_whole_blocks_that_arrived_before_a_stall_are_not_fetched_again(server, path):
    server.body = np.random.default_rng(2).bytes(3 * 2**20)
    server.faults = [{"stall": 5 * 2**19}]
    assert_arrived(path, server.body, fetch(server, path, timeout=0.5))
    assert int(re.fullmatch(r"bytes=(\d+)-", server.sent_ranges[1])[1]) >= 2 * 2**20


def test_all_that_arrived_before_a_stall_is_kept(server, path):
    server.faults = [{"stall": 4000}]
    assert_arrived(path, BODY, fetch(server, path, timeout=0.2))
    assert server.sent_ranges == [None, "bytes=4000-"]


@pytest.mark.parametrize("label", ["the answer", "the rest"])
def test_an_answer_later_than_the_timeout_is_a_failed_attempt(label, server, path):
    server.faults = [{"delay": 1.0}] if label == "the answer" else [{"cut": 4000}, {"delay": 1.0}]
    expected = [None, None] if label == "the answer" else [None, "bytes=4000-", "bytes=4000-"]
    assert_arrived(path, BODY, fetch(server, path, timeout=0.2))
    assert server.sent_ranges == expected


# ---- servers that change their file, or lie


def change(server, **attributes):
    return lambda: [setattr(server, key, value) for key, value in attributes.items()]


@pytest.mark.parametrize(
    "body",
    [OTHER, OTHER[:5000], OTHER[:2000], OTHER * 2],
    ids=["as long", "half", "shorter than what is here", "twice"],
)
@pytest.mark.parametrize("kind", ["tag", "date"])
def test_a_file_that_changes_between_attempts_is_fetched_whole_and_never_mixed(kind, body, server, path):
    new = {"body": body, "etag": '"two"'}
    if kind == "date":
        server.etag, server.modified, new = None, MONDAY, {"body": body, "modified": TUESDAY}
    server.faults = [{"cut": 4000}, {"before": change(server, **new)}]
    assert_arrived(path, body, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-"]


def test_a_changed_file_is_resumed_under_its_new_version(server, path):
    server.faults = [{"cut": 4000}, {"before": change(server, body=OTHER, etag='"two"'), "cut": 6000}]
    assert_arrived(path, OTHER, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-", "bytes=6000-"]
    assert server.requests[2]["If-Range"] == '"two"'


def test_a_server_that_stops_naming_a_version_is_not_resumed(server, path):
    server.faults = [{"cut": 4000}, {"before": change(server, etag=None), "cut": 6000}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-", None]


def test_a_rest_that_says_it_is_of_another_version_is_not_appended(server, path):
    server.honours_if_range = False
    server.faults = [{"cut": 4000}, {"before": change(server, body=OTHER, etag='"two"')}]
    # ignore; the two files are mixed and the mixture is handed over as whole.
    assert_arrived(path, OTHER, fetch(server, path))


def test_a_rest_of_a_file_of_another_length_is_not_appended(server, path):
    longer = OTHER + b"more"
    server.faults = [{"cut": 4000}, {"before": change(server, body=longer)}]  # under the same tag
    try:
        found = fetch(server, path)
    except DownloadError:
        return
    assert_arrived(path, longer, found)


@pytest.mark.parametrize("total", [7, -7])
def test_a_false_total_of_the_rest_never_gives_a_wrong_file(total, server, path):
    server.faults = [{"cut": 4000}, {"total": total}]
    assert_arrived(path, BODY, fetch(server, path))


@pytest.mark.parametrize("start", [1, -1, 500])
def test_a_rest_that_begins_elsewhere_is_thrown_away_and_the_file_fetched_whole(start, server, path):
    server.faults = [{"cut": 4000}, {"start": start}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-", None]


def test_a_rest_that_always_begins_elsewhere_fails_with_what_the_server_sent(server, path):
    server.faults = [{"cut": 4000}, {"start": 1}, {"cut": 4000}, {"start": 1}]
    with pytest.raises(DownloadError, match=r"bytes 4001-9999/10000.*after 4 attempts"):
        fetch(server, path)
    assert beside(path) == []


def test_a_range_that_the_server_no_longer_has_is_given_up(server, path):
    server.faults = [{"cut": 4000}, {"status": 416}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, "bytes=4000-", None]


@pytest.mark.parametrize("length", [1, 1000, 10**9])
def test_a_body_shorter_than_announced_fails_with_both_sizes(length, server, path):
    server.ranges, server.always = False, {"length": length}
    with pytest.raises(DownloadError, match=f"got 10000 bytes of {10_000 + length} after 4 attempts"):
        fetch(server, path)
    assert len(server.requests) == 4 and beside(path) == []


def test_corrupt_bytes_show_in_the_sum(server, path):
    server.body = BODY[:5000] + bytes([BODY[5000] ^ 1]) + BODY[5001:]
    found = fetch(server, path)
    assert found.size == len(BODY) and found.sha256 != hashlib.sha256(BODY).hexdigest()
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is tried again, and what is left


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_error_that_stays_is_not_tried_again(status, server, path):
    server.always = {"status": status}
    with pytest.raises(DownloadError, match=f"status {status}") as error:
        fetch(server, path)
    assert "attempts" not in str(error.value)
    assert len(server.requests) == 1 and beside(path) == []


@pytest.mark.parametrize("status", [408, 416, 429, 500, 502, 503, 504])
def test_an_error_that_may_pass_is_tried_four_times(status, server, path):
    server.always = {"status": status}
    with pytest.raises(DownloadError, match=f"status {status}.*after 4 attempts"):
        fetch(server, path)
    assert len(server.requests) == 4 and beside(path) == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_an_error_that_passes_costs_nothing_of_what_has_arrived(status, server, path):
    server.faults = [{"cut": 4000}, {"status": status}, {"status": status}]
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None, *["bytes=4000-"] * 3]


def test_a_file_that_vanishes_in_the_middle_ends_the_download_at_once(server, path):
    server.faults, server.always = [{"cut": 4000}], {"status": 404}
    with pytest.raises(DownloadError, match=r"status 404.*after 2 attempts"):
        fetch(server, path)
    assert len(server.requests) == 2


def test_the_pause_doubles_and_is_told(server, path, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    monkeypatch.setattr(module, "BACK_OFF", 0.25)
    server.always = {"status": 503}
    with pytest.raises(DownloadError):
        fetch(server, path)
    assert pauses == [0.25, 0.5, 1.0]
    printed = "".join(capsys.readouterr())
    assert "it: status 503" in printed and "trying again in 0.25 s" in printed and "trying again in 1 s" in printed


def test_the_first_pause_is_a_second():
    source = Path(module.__file__).read_text()
    assert re.search(r"^BACK_OFF = 1\.0$", source, re.MULTILINE)


def test_after_failure_nothing_is_left_where_the_server_cannot_resume(server, path):
    server.ranges, server.always = False, {"cut": 4000}
    with pytest.raises(DownloadError, match="got 4000 bytes of 10000 after 4 attempts"):
        fetch(server, path)
    assert beside(path) == []


def test_after_failure_what_arrived_is_left_with_its_description_where_it_can(server, path):
    server.always = {"cut": 1000}
    with pytest.raises(DownloadError, match="got 4000 bytes of 10000 after 4 attempts"):
        fetch(server, path)
    assert beside(path) == PARTIAL
    assert path.with_name(PARTIAL[0]).read_bytes() == BODY[:4000]
    description = json.loads(path.with_name(PARTIAL[1]).read_text())
    assert description["url"] == server.address() and description["version"] == '"one"'


def test_a_host_that_disappears_leaves_what_arrived_for_later(server, path):
    server.faults = [{"cut": 4000, "before": server.close_soon}]
    with pytest.raises(DownloadError, match="after 4 attempts"):
        fetch(server, path)
    assert len(server.requests) == 1
    assert beside(path) == PARTIAL and path.with_name(PARTIAL[0]).read_bytes() == BODY[:4000]


def test_a_host_that_never_answers_is_tried_four_times_and_leaves_nothing(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file.hdf5"
    with pytest.raises(DownloadError, match=r"refused.*after 4 attempts"):
        download(url, path, label="it", timeout=1.0)
    assert beside(path) == []


@pytest.mark.parametrize(
    "url", ["gopher://127.0.0.1/x", "file:///no/such/file", "mirror.hdf5", "http://127.0.0.1:port"]
)
def test_an_address_that_cannot_be_one_is_not_tried_again(url, path, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(DownloadError):
        download(url, path, label="it")
    assert beside(path) == []


# ---- what an earlier download left


def leave(server, path, size=4000, body=BODY, **description):
    path.with_name(PARTIAL[0]).write_bytes(body[:size])
    known = {"url": server.address(), "version": '"one"', "total": len(BODY), **description}
    path.with_name(PARTIAL[1]).write_text(json.dumps(known))


def test_a_later_download_goes_on_where_the_earlier_one_failed(server, path):
    server.always = {"cut": 1000}
    with pytest.raises(DownloadError):
        fetch(server, path)
    server.requests, server.always = [], {}
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == ["bytes=4000-"] and server.requests[0]["If-Range"] == '"one"'


def test_a_later_download_of_a_file_that_has_changed_is_whole(server, path):
    server.always = {"cut": 1000}
    with pytest.raises(DownloadError):
        fetch(server, path)
    server.always, server.body, server.etag = {}, OTHER, '"two"'
    assert_arrived(path, OTHER, fetch(server, path))
    assert len(server.requests) == 5


def test_what_is_left_of_another_address_is_not_used(server, path):
    server.always = {"cut": 1000}
    with pytest.raises(DownloadError):
        download(server.address("/other.hdf5"), path, label="it")
    server.requests, server.always, server.body = [], {}, OTHER  # under the same tag
    assert_arrived(path, OTHER, fetch(server, path))
    assert server.sent_ranges == [None]


@pytest.mark.parametrize(
    "description", [b"", b"{", b"[]", b"null", b"7", b"{}", b"\xff\xfe", b'{"version": "x"}', b'{"url": "x"}', None]
)
def test_what_is_left_without_a_usable_description_is_not_used(description, server, path):
    leave(server, path, body=OTHER)
    if description is None:
        path.with_name(PARTIAL[1]).unlink()
    else:
        path.with_name(PARTIAL[1]).write_bytes(description)
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None]


def test_a_description_without_its_file_is_no_harm(server, path):
    leave(server, path)
    path.with_name(PARTIAL[0]).unlink()
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == [None]


def test_a_whole_file_that_was_left_is_handed_over_whole(server, path):
    leave(server, path, size=len(BODY))
    assert_arrived(path, BODY, fetch(server, path))


def test_more_than_the_file_that_was_left_is_thrown_away(server, path):
    leave(server, path, size=len(BODY) + 5, body=BODY + b"extra")
    assert_arrived(path, BODY, fetch(server, path))


def test_a_server_that_no_longer_resumes_is_fetched_from_whole(server, path):
    leave(server, path)
    server.ranges = False
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == ["bytes=4000-"]


@pytest.mark.parametrize("status", [404, 503])
def test_what_was_left_survives_an_error_of_the_server(status, server, path):
    leave(server, path)
    server.always = {"status": status}
    with pytest.raises(DownloadError):
        fetch(server, path)
    server.requests, server.always = [], {}
    assert_arrived(path, BODY, fetch(server, path))
    assert server.sent_ranges == ["bytes=4000-"]


DOWNLOAD = """
import sys
from pathlib import Path
from iql_torchrl.data.download import download

print(download(sys.argv[1], Path(sys.argv[2]), label="it", timeout=60.0))
"""
LOAD = """
import sys
from iql_torchrl.data.transitions import fingerprint
from iql_torchrl import load_transitions

print(fingerprint(load_transitions("d4rl", name=sys.argv[3], root=sys.argv[2], url=sys.argv[1])))
"""


def start(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out


def kill_when_it_has(process, partial, size):
    """SIGKILL, once that much has arrived; returns how much it was."""
    limit = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size >= size):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return partial.stat().st_size


@pytest.mark.slow
def test_a_process_goes_on_where_a_killed_one_was(server, path):
    server.body = np.random.default_rng(3).bytes(5 * 2**20 + 123)
    server.faults = [{"stall": 7 * 2**19}]
    process = start(DOWNLOAD, server.address(), path)
    partial = path.with_name(PARTIAL[0])
    left = kill_when_it_has(process, partial, 2**20)
    assert beside(path) == PARTIAL and partial.read_bytes() == server.body[:left]

    printed = finish(start(DOWNLOAD, server.address(), path))
    assert server.sent_ranges == [None, f"bytes={left}-"] and server.requests[1]["If-Range"] == '"one"'
    assert hashlib.sha256(server.body).hexdigest() in printed
    assert path.read_bytes() == server.body and beside(path) == ["file"]


# ---- through the d4rl source


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hdf5(log_arrays, write_log, qlearning_dataset):
    """Bytes of a D4RL file, and its transitions by the rule."""

    def make(rows=40, seed=0):
        arrays = log_arrays(rows, seed=seed, terminals=[6, 24], timeouts=[13, 30])
        return write_log(arrays, f"{seed}.hdf5").read_bytes(), qlearning_dataset(arrays)

    return make


def load(server, root, **options):
    return load_transitions("d4rl", name=NAME, root=root, url=server.address(), **{"timeout": 5.0, **options})


def content(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def in_root(root):
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(
    "faults",
    [
        [{"cut": 1000}, {"cut": 1000}, {"cut": 1000}],
        [{"status": 503}, {"cut": 4000}],
        [{"cut": 4000}, {"start": 1}],
        [{"cut": 4000}, {"status": 416}],
        [{"chunked": True, "cut": 4000}],
    ],
    ids=["cuts", "503", "wrong start", "416", "cut chunks"],
)
def test_a_dataset_from_a_server_that_stumbles_is_that_of_the_rule(
    faults, hdf5, server, root, assert_transitions_equal
):
    (server.body, expected), server.faults = hdf5(), [*faults]
    assert_transitions_equal(load(server, root), expected)
    assert len(server.requests) == len(faults) + 1
    assert in_root(root) == [f".{NAME}.lock", NAME]
    record = json.loads((root / NAME / "iql_torchrl.json").read_text())
    assert record["file"] == {"size": len(server.body), "sha256": hashlib.sha256(server.body).hexdigest()}


def test_a_dataset_that_changes_while_it_is_fetched_is_the_later_one(hdf5, server, root, assert_transitions_equal):
    server.body, (later, expected) = hdf5()[0], hdf5(seed=1)
    server.faults = [{"cut": 4000}, {"before": change(server, body=later, etag='"two"')}]
    assert_transitions_equal(load(server, root), expected)


def test_a_later_load_goes_on_where_a_failed_one_was(hdf5, server, root, assert_transitions_equal):
    (server.body, expected), server.always = hdf5(), {"cut": 1000}
    with pytest.raises(DatasetError, match=f"{NAME}.*{re.escape(server.address())}.*got 4000 bytes of"):
        load(server, root)
    assert in_root(root) == [f".{NAME}.{end}" for end in ("download.partial", "download.partial.json", "lock")]
    server.requests, server.always = [], {}
    assert_transitions_equal(load(server, root), expected)
    assert server.sent_ranges == ["bytes=4000-"]
    assert in_root(root) == [f".{NAME}.lock", NAME]


def test_a_load_that_fails_leaves_nothing_where_the_server_cannot_resume(hdf5, server, root):
    server.body, server.ranges, server.always = hdf5()[0], False, {"cut": 1000}
    with pytest.raises(DatasetError, match="got 1000 bytes of"):
        load(server, root)
    assert in_root(root) == [f".{NAME}.lock"]


@pytest.mark.parametrize(("status", "requests"), [(403, 1), (404, 1), (416, 4), (429, 4), (500, 4), (503, 4)])
def test_a_load_names_the_status_and_asks_as_often_as_it_helps(status, requests, server, root):
    server.always = {"status": status}
    with pytest.raises(DatasetError, match=f"{re.escape(server.address())} .status {status}.*dataset.url=ADDRESS"):
        load(server, root)
    assert len(server.requests) == requests and in_root(root) == [f".{NAME}.lock"]


@pytest.mark.parametrize("keep", [10, 1000, 5000, -1])
def test_a_body_larger_than_announced_is_refused_as_cut_and_the_cache_is_as_before(
    keep, hdf5, server, root, assert_transitions_equal
):
    server.body, expected = hdf5()
    load_transitions("d4rl", name="walker2d-medium-v2", root=root, url=server.address())
    server.requests = []
    server.always = {"length": (keep if keep > 0 else len(server.body) + keep) - len(server.body)}
    before = content(root)
    with pytest.raises(DatasetError, match=re.escape(server.address())):
        load(server, root)
    found = content(root)
    assert found.pop(root / f".{NAME}.lock") == b"" and found == before
    server.always = {}
    assert_transitions_equal(load(server, root), expected)


@pytest.mark.slow
def test_a_load_goes_on_where_a_killed_process_was(hdf5, server, root, assert_transitions_equal):
    server.body, expected = hdf5(100_000)
    server.faults = [{"stall": 3 * 2**19}]
    partial = root / f".{NAME}.download.partial"
    left = kill_when_it_has(start(LOAD, server.address(), root, NAME), partial, 2**20)
    finish(start(LOAD, server.address(), root, NAME))
    assert server.sent_ranges == [None, f"bytes={left}-"]
    assert in_root(root) == [f".{NAME}.lock", NAME]
    assert_transitions_equal(load(server, root, download=False), expected)
