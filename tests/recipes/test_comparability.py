"""Scores that do not compare, as a user sees it: what recipes print, a run's summary and picture."""

import json
import re

import gymnasium
import pytest
from PIL import Image
from processes import SMALL, run
from recordings import record

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*(out of date|is set to None).*")]

NAME = "mujoco/halfcheetah/medium-v0"
MARK = "Minari's, not D4RL's halfcheetah-medium-v2"


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    """A folder of Minari's with a set of whole random episodes."""
    root = tmp_path_factory.mktemp("minari")
    record(NAME, gymnasium.make("HalfCheetah-v5"), root, 2)
    return root


def trained(cheetah, folder, *options):
    data = ("dataset=minari", f"dataset.name={NAME}", f"dataset.root={cheetah}", "dataset.download=false")
    options = (*SMALL, "eval.episodes=1", "train.steps=20", *options, f"run_dir={folder / 'run'}")
    out = run("iql_offline.py", *data, *options, cwd=folder)
    return out, json.loads((folder / "run" / "summary.json").read_text())


def test_a_run_says_it_in_its_first_line_its_summary_and_its_picture(cheetah, tmp_path):
    out, summary = trained(cheetah, tmp_path)
    first, second, *_ = out.splitlines()
    assert first.startswith(f"IQL on {NAME} ({MARK}): 2,000 transitions")
    (remark,) = summary["remarks"]
    assert remark["mark"] == MARK and remark["sentence"] == second == summary["warnings"][0]
    assert "those of D4RL's halfcheetah-medium-v2 4,770.3" in second
    assert summary["published_name"] is None and summary["score_references"] == [-280.178953, 12135.0]
    assert "remarks" not in out and not re.search("score_references|published_name", out)
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.text["Title"] == f"IQL on {NAME} ({MARK})"

    out = run("evaluate.py", f"checkpoint={tmp_path / 'run'}", "episodes=1", cwd=tmp_path)
    assert "the run was in" not in out and re.search(r"normalised score +-?[0-9]", out)
    out = run("evaluate.py", f"checkpoint={tmp_path / 'run'}", "episodes=1", "env.name=HalfCheetah-v4", cwd=tmp_path)
    assert "the run was in" not in out and re.search(r"normalised score +-?[0-9]", out)
    out = run("evaluate.py", f"checkpoint={tmp_path / 'run'}", "episodes=1", "env.name=Walker2d-v5", cwd=tmp_path)
    assert re.search("the run was in +HalfCheetah-v5: another task", out)
    assert re.search("normalised score +not comparable: the data are of HalfCheetah-v5", out)


def test_another_task_is_evaluated_by_its_return_alone(cheetah, tmp_path):
    out, summary = trained(cheetah, tmp_path, "env.name=Walker2d-v4")
    assert out.startswith(f"IQL on {NAME} ({MARK}; HalfCheetah-v5 data in Walker2d-v4): 2,000 transitions")
    assert summary["score"] == "return" and summary["data_score"] is None and summary["score_references"] is None
    assert "not comparable: the data are of HalfCheetah-v5" in summary["score_note"]
    assert [one["mark"] for one in summary["remarks"]] == [MARK, "HalfCheetah-v5 data in Walker2d-v4"]
    assert "another task" in summary["warnings"][1] and summary["warnings"][1] in out


def test_the_inspection_says_it_too(cheetah, tmp_path):
    data = ("dataset=minari", f"dataset.name={NAME}", f"dataset.root={cheetah}", "dataset.download=false")
    out = run("inspect_dataset.py", *data, f"output={tmp_path / 'report'}", cwd=tmp_path)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (sentence,) = report["remarks"]
    assert f"is {MARK}" in sentence and re.search(f"scores +{re.escape(sentence)}", out)
    assert f"return {report['returns']['mean']:.1f} on average" in sentence
