"""The report as a user makes it and reads it: a real process, a real browser."""

import json
import shutil

import pytest
from browsing import MISSING, browser
from processes import SMALL, finish, refused, run, start

pytestmark = pytest.mark.slow
in_a_browser = pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}")

SCORES = {"0": (3.0, 1.0), "1": (-20.0, 2.0), "2": (100.0, 5.0)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, pendulum):
    """A sweep over two temperatures and two seeds, of which one job fails and another was interrupted."""
    folder = tmp_path_factory.mktemp("sweep")
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1", "train.steps=40")
    swept = ("train.seed=0,1", "algorithm.temperature=0,3", f"run_dir={folder / 'runs'}")
    run("iql_offline.py", "-m", *options, *swept, cwd=folder)
    return folder / "runs"


@pytest.fixture(scope="module")
def report(sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    copied = shutil.copytree(sweep, folder / "runs")
    # Three more tasks, so that there is something to sort: the log under other names, with scores of their own.
    for name, (score, std) in SCORES.items():
        for job in (0, 1, 2):
            more = shutil.copytree(sweep / str(job), folder / "more" / f"task-{name}-{job}")
            text = (more / "config.yaml").read_text().replace("pendulum.hdf5", f"task-{name}.hdf5")
            (more / "config.yaml").write_text(text)
            content = json.loads((more / "summary.json").read_text())
            content |= {"score": "normalised score", "dataset_fingerprint": name, "final_score": score + std * job}
            (more / "summary.json").write_text(json.dumps(content))
    (copied / "3" / "summary.json").unlink()
    out = run("report.py", f"runs=[{folder / 'more'},{copied},{folder / 'absent'}]", "output=page", cwd=folder)
    return folder / "page", out


def test_the_table_is_printed_with_what_is_not_in_it(report):
    folder, out = report
    assert "pendulum, return" in out and "task-2, normalised score" in out and "behaviour cloning" in out
    assert f"! {folder.parent / 'absent'}: missing, does not exist" in out
    assert "/runs/3: unfinished, no summary.json" in out
    assert "wrote page/report.html" in out


@in_a_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_is_read_at_any_width_in_light_and_dark_without_a_network(report, width, dark):
    with browser(width, dark=dark) as window:
        window.devtools("Network.enable", {})
        window.devtools("Network.emulateNetworkConditions", {"offline": True, "latency": 0, "downloadThroughput": 0,
                                                             "uploadThroughput": 0})  # fmt: skip
        window.open(report[0] / "report.html")
        assert window.run("return document.title") == "IQL runs" and window.errors() == []
        assert window.run("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
        images = window.run("return [...document.images].map(image => image.complete && image.naturalWidth > 300)")
        assert len(images) == 3 + 4 and all(images)
        assert window.run("return [...document.images].every(image => image.width <= innerWidth)")
        colours = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
        ink, paper = (sum(map(int, one[4:-1].split(","))) for one in window.run(colours))
        assert (ink > 600 and paper < 100) if dark else (ink < 100 and paper == 765)
        filters = window.run("return getComputedStyle(document.images[0]).filter")
        assert ("invert" in filters) == dark
        heads = "return [...document.querySelectorAll('h2')].map(one => one.textContent)"
        assert window.run(heads)[:5] == ["Scores", "Over all tasks", "Curves", "Speed", "Findings"]
        # What is wider than the window scrolls by itself.
        assert window.run(
            "return [...document.querySelectorAll('.scroll')].every(one => one.clientWidth <= innerWidth)"
        )
        assert "absent" in window.run("return document.querySelector('#listed').textContent")


@in_a_browser
def test_a_table_is_sorted_by_a_click_on_a_head(report):
    first = "return [...document.querySelectorAll('#scores tbody tr')].map(row => row.cells[{}].dataset.sort)"
    with browser() as window:
        window.open(report[0] / "report.html")
        assert window.run(first.format(0)) == ["task-0", "task-1", "task-2", "pendulum"]
        window.click("#scores thead button", 1)
        values = [float(value) for value in window.run(first.format(1))]
        assert values == sorted(values) and len(set(values)) == 4
        assert window.run("return document.querySelectorAll('#scores th')[1].ariaSort") == "ascending"
        window.click("#scores thead button", 1)
        assert [float(value) for value in window.run(first.format(1))] == sorted(values, reverse=True)
        window.click("#scores thead button", 0)
        assert window.run(first.format(0)) == ["pendulum", "task-0", "task-1", "task-2"]
        assert window.run("return document.querySelectorAll('#scores th')[1].ariaSort") is None
        assert window.run("return document.querySelector('#scores td.best').textContent").strip()


@in_a_browser
def test_empty_cells_stay_last_and_details_open(report):
    with browser() as window:
        window.open(report[0] / "report.html")
        assert not window.run("return document.querySelector('details').open")
        window.click("summary")
        assert window.run("return document.querySelector('details').open")
        assert window.run("return document.querySelectorAll('#runs tbody tr').length") == 12
        window.click("#runs thead button", 4)
        column = "return [...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[4].dataset.sort)"
        values = [float(one) for one in window.run(column)]
        assert values == sorted(values)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("runs=[]",), "runs must be a list of folders and patterns"),
        (("runs=nothing/*",), "runs must be a list of folders and patterns"),
        ((), "option runs is needed; give runs='[runs/hopper-*]'"),
        (("runs=[nothing/*]",), "names no finished run with a score: nothing/*: missing, matches nothing"),
        (("runs=[nothing,file]",), "nothing: missing, does not exist; file: foreign, is no folder"),
        (("runs=[folder]",), "folder: foreign, holds no run"),
        (("runs=[folder]", "ouput=page"), "unknown option ouput; did you mean 'output'"),
    ],
)
def test_a_mistake_is_refused_with_one_line(options, says, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    message = refused("report.py", *options, cwd=tmp_path)
    assert says in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_output_that_cannot_be_written_is_refused(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused("report.py", f"runs=[{sweep}]", f"output={tmp_path / 'file' / 'page'}", cwd=tmp_path)
    assert "cannot be written" in message


def test_runs_are_read_and_left_as_they_are_and_those_without_a_score_are_listed(sweep, pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=10")
    before = {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()}
    code, _, error = finish(start("report.py", f"runs=[{sweep}]", "output=page", cwd=tmp_path))
    assert code == 0, error
    assert {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()} == before
    run("iql_offline.py", *options, "run_dir=other", cwd=tmp_path)
    out = run("report.py", f"runs=[{sweep},other]", "output=page", cwd=tmp_path)
    assert "other: no score, was evaluated in no environment" in out
