"""What the section "Security" of the package's README claims, where no other test does."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from processes import ROOT, SMALL

from iql_torchrl import load_transitions, train
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.configuration.declaring import find_mistakes
from iql_torchrl.configuration.rlinf import read_overrides
from iql_torchrl.data.download import DownloadError, download
from iql_torchrl.data.sources import D4RL
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.reporting.run_folder import RunFolder
from iql_torchrl.running.options import OfflineOptions

SECRET = "5ecre7" * 8
NAME = "hopper-medium-v2"


# ---- what is never executed


def calls():
    """Every call in the package: its file, its name as it is written, and its keyword arguments."""
    for path in sorted((ROOT / "iql_torchrl").rglob("*.py")) + sorted((ROOT / "recipes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {one.arg: ast.unparse(one.value) for one in node.keywords}
                yield path.relative_to(ROOT), ast.unparse(node.func), keywords


def test_nothing_evaluates_text_instantiates_what_a_file_names_or_starts_a_shell():
    never = re.compile(
        r"(builtins\.)?(eval|exec|compile)|.*\b(instantiate|get_class|get_object|get_method|unsafe_load|full_load)"
        r"|yaml\.load|(pickle|cloudpickle|dill|joblib|marshal)\.\w+|os\.(system|popen)|.*\bextractall"
    )
    found = [(str(path), name) for path, name, _ in calls() if never.fullmatch(name)]
    assert found == []


def test_checkpoints_and_arrays_are_loaded_as_plain_values_alone():
    weights_only = [keywords.get("weights_only") for _, name, keywords in calls() if name == "torch.load"]
    allow_pickle = [keywords.get("allow_pickle", "False") for _, name, keywords in calls() if name == "np.load"]
    assert set(weights_only) == {"True"} and set(allow_pickle) == {"False"}


# ---- configurations


@pytest.mark.parametrize(
    "text",
    [
        "data: {task_name: '${oc.env:IQL_TEST_SECRET}'}",
        "data: {task_name: 'hopper-${oc.env:IQL_TEST_SECRET}-v2'}",
        "data: {dataset_path: '/tmp/${oc.env:IQL_TEST_SECRET}/my.hdf5'}",
        "a: '${oc.env:IQL_TEST_SECRET}'\ndata: {task_name: '${a}'}",
        "name: env\ndata: {task_name: '${oc.${name}:IQL_TEST_SECRET}'}",
        f"data: {{task_name: {NAME}}}\nalgorithm: {{hidden_dims: ['${{oc.env:IQL_TEST_SECRET}}']}}",
        f"data: {{task_name: {NAME}}}\nactor: '${{oc.create:{{seed: ${{oc.env:IQL_TEST_SECRET}}}}}}'",
    ],
)
def test_a_file_of_rlinf_reads_no_variable_of_the_environment(text, tmp_path, monkeypatch):
    monkeypatch.setenv("IQL_TEST_SECRET", SECRET)
    (tmp_path / "theirs.yaml").write_text(text)
    try:
        found = str(read_overrides(tmp_path / "theirs.yaml"))
    except ConfigurationError as error:
        found = str(error)
        assert "write the value out" in found
    assert SECRET not in found


def test_what_a_file_of_rlinf_has_no_use_for_may_refer_to_the_environment(tmp_path):
    text = f"data: {{task_name: {NAME}}}\nlogs: '${{oc.env:NOWHERE}}/logs'\n"
    (tmp_path / "theirs.yaml").write_text(text)
    options, ignored = read_overrides(tmp_path / "theirs.yaml")
    assert options["dataset.name"] == NAME and ignored == ["logs"]


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "iql_trap.py").write_text(f"open({str(folder / 'sprung')!r}, 'w').close()\ndef make(**_): pass\n")
    monkeypatch.syspath_prepend(folder)
    yield folder / "sprung"
    sys.modules.pop("iql_trap", None)


def test_the_target_of_hydra_in_a_file_of_rlinf_is_a_key_without_meaning(trap, tmp_path):
    text = f"_target_: iql_trap.make\ndata: {{task_name: {NAME}, _target_: iql_trap.make}}\n"
    (tmp_path / "theirs.yaml").write_text(text)
    _, ignored = read_overrides(tmp_path / "theirs.yaml")
    assert ignored == ["_target_", "data._target_"] and not trap.exists()


def small_run(folder, **options):
    random = np.random.default_rng(0)
    data = {"observations": random.normal(size=(200, 3)), "actions": random.uniform(-1, 1, (200, 1))}
    data |= {"rewards": random.normal(size=200), "terminals": np.arange(200) % 20 == 19}
    options = {"train.compile": False, "train.products": "mkl", **options}
    return train(
        data, environment=None, steps=2, folder=folder, quiet=True, options=options, hidden_dims=[8, 8], batch_size=16
    )


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("project: ${oc.env:IQL_TEST_SECRET}", "${oc.env:IQL_TEST_SECRET}"),
        ("_target_: iql_trap.make\n  project: mine", None),
        ("project: !!python/object/apply:iql_trap.make {}", None),
        ("project: mine\n  kind: csv,iql_trap", None),
    ],
)
def test_the_configuration_in_a_run_folder_is_plain_values(line, kept, trap, tmp_path, monkeypatch):
    monkeypatch.setenv("IQL_TEST_SECRET", SECRET)
    names = ("dataset=hdf5", f"dataset.path={tmp_path}/my.hdf5", "env.name=null", "logger=wandb")
    with initialised():
        values = compose("iql_offline", names, OfflineOptions).model_dump(exclude_unset=True)
    RunFolder(tmp_path / "run").write_config(values)
    path = tmp_path / "run" / "config.yaml"
    text = path.read_text()
    assert "project: iql_torchrl" in text
    path.write_text(text.replace("project: iql_torchrl", line))
    try:
        with initialised():
            found = compose("iql_offline", ("resume=auto",), OfflineOptions, folder=tmp_path / "run").logger.project
    except ConfigurationError as error:
        found = None
        assert SECRET not in str(error)
    assert found == kept and not trap.exists()


# ---- secrets


@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{SECRET}@host/file.hdf5",
        f"https://{SECRET}@host/file.hdf5",
        f"https://host/file.hdf5?X-Amz-Date=1&X-Amz-Signature={SECRET}",
        f"https://host/file.hdf5?sig={SECRET}",
        f"https://host/file.hdf5?access_token={SECRET}",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(url):
    (message,) = find_mistakes(D4RL, {"source": "d4rl", "name": NAME, "url": url}, "dataset.")
    assert message.startswith("dataset.url must be an address without") and "file:///PATH" in message
    assert SECRET not in message


@pytest.mark.parametrize("url", ["https://host/f.hdf5?download=1", "file:///home/a@b/f.hdf5", "http://[x", None])
def test_any_other_address_is_an_address(url):
    assert find_mistakes(D4RL, {"source": "d4rl", "name": NAME, "url": url}, "dataset.") == []


def test_a_run_writes_down_no_secret_of_the_environment(tmp_path):
    arrays = {"observations": np.zeros((200, 3)), "actions": np.zeros((200, 1)), "rewards": np.ones(200)}
    np.savez(tmp_path / "my.npz", **arrays, terminals=np.arange(200) % 20 == 19)
    secrets = {
        "WANDB_API_KEY": SECRET[:40],
        "HF_TOKEN": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HTTP_PROXY": f"http://me:{SECRET}@127.0.0.1:9",
        "HTTPS_PROXY": f"http://me:{SECRET}@127.0.0.1:9",
    }
    for command in (["init", "-q"], ["remote", "add", "origin", f"https://me:{SECRET}@host.invalid/my.git"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    arguments = ("dataset=numpy", "dataset.path=my.npz", "env.name=null", "train.steps=20", "train.products=mkl")
    command = [sys.executable, str(ROOT / "recipes" / "iql_offline.py"), *SMALL, *arguments, "logger=wandb"]
    environment = {**os.environ, **secrets, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "run_dir=run"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.json", "step-00000020.pt"} < {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET[:40].encode() in path.read_bytes()] == []


# ---- places


def test_a_name_of_d4rl_is_that_of_one_folder():
    from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name) for name in D4RL_DATASETS)


@pytest.mark.parametrize("source", ["d4rl", "minari"])
@pytest.mark.parametrize("name", ["../outside-v0", "/outside-v0", "a/../../outside-v0", f"./{NAME}", f"{NAME}/..", "."])
def test_a_name_that_leads_out_of_the_cache_is_refused_and_nothing_touched(source, name, tmp_path):
    (tmp_path / "outside-v0").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((DatasetError, ConfigurationError)):
        load_transitions(source, name=name, root=tmp_path / "root")
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "root"] == before


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1:1/x", "data:text/plain,x"])
def test_a_server_cannot_send_a_download_to_a_file_of_this_machine(place, tmp_path, monkeypatch):
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", place)
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("iql_torchrl.data.download.BACK_OFF", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with pytest.raises(DownloadError):
            download(f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x", label="x")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_a_link_is_replaced_and_what_it_leads_to_is_left(tmp_path):
    import h5py

    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "precious").write_text("mine")
    (root / NAME).symlink_to(outside)
    with h5py.File(tmp_path / "file.hdf5", "w") as file:
        file["observations"], file["actions"] = np.zeros((50, 11), np.float32), np.zeros((50, 3), np.float32)
        file["rewards"], file["terminals"] = np.zeros(50, np.float32), np.arange(50) % 10 == 9
        file["timeouts"] = np.zeros(50, bool)
    url = (tmp_path / "file.hdf5").as_uri()
    found = load_transitions("d4rl", name=NAME, root=root, url=url, rebuild=True)
    assert len(found) == 49 and not (root / NAME).is_symlink()
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "mine"


def test_a_checkpoint_holds_plain_values_alone(tmp_path):
    small_run(tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoints").glob("step-*.pt")
    waiting = [torch.load(path, weights_only=True)]
    while waiting:
        one = waiting.pop()
        assert one is None or isinstance(one, bool | int | float | str | torch.Tensor | dict | list | tuple | bytes)
        waiting += (
            [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list | tuple) else []
        )


def test_names_in_a_file_neither_break_the_line_of_an_error_nor_steer_a_terminal(tmp_path):
    path = tmp_path / "log.npz"
    np.savez(path, **{"observations": np.zeros((4, 2)), "a\nerror: b": np.zeros(4), "\x1b[2Jc": np.zeros(4)})
    with pytest.raises(DatasetError, match=r"missing actions, rewards") as refused:
        load_transitions(path)
    message = str(refused.value)
    assert message.isprintable()
    assert r"a\nerror: b" in message and r"\x1b[2Jc" in message
