"""Videos: which episodes they are of, what is in their pictures, and what is refused."""

import os
import re

import numpy as np
import pytest
import torch
from pictures import SIZE
from processes import SMALL, finish, run, start

from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError, SimulatorError
from iql_torchrl.evaluation import video
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.evaluation.video import film_extremes, prepare_video
from iql_torchrl.networks import build_actor

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra video")
SEED = 40


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return Policy(build_actor(5, 2, hidden_dims=(16,)), torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))


def evaluate(name, policy, episodes=6, **kwargs):
    evaluator = Evaluator(EnvironmentSpec.of(f"pictures:{name}-v0", kwargs), episodes=episodes, seed=SEED)
    try:
        return evaluator.evaluate(policy)
    finally:
        evaluator.close()


def pictures_in(path):
    """What the file says of itself, and its pictures ``[T, H, W, 3]``."""
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(one, np.uint8).reshape(height, width, 3) for one in reader])


def test_the_best_and_the_worst_episode_are_played_again_picture_by_picture(policy, tmp_path):
    evaluation, told = evaluate("Square", policy), []
    written = film_extremes(evaluation, policy, SEED, tmp_path / "videos", "step-7", told.append)
    assert [path.name for path in written] == ["step-7-best.mp4", "step-7-worst.mp4"]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == [path.name for path in written]
    for path, episode, line in zip(
        written, (evaluation.returns.argmax(), evaluation.returns.argmin()), told, strict=True
    ):
        about, pictures = pictures_in(path)
        assert (about["fps"], about["codec"], pictures.shape[1:]) == (25, "h264", (*SIZE, 3))
        length = evaluation.lengths[episode]
        assert len(pictures) == length + 1  # before every step and after the last
        # The square turns from green to red; the right lower corner is beside the caption.
        corner = pictures[:, -10:, -10:].mean((1, 2))
        np.testing.assert_allclose(corner[:, 0], 200, atol=12)
        np.testing.assert_allclose(corner[:, 1], 10 * np.arange(length, -1, -1), atol=12)
        assert f"{evaluation.returns[episode]:.1f}, seed {SEED + episode}: {path}" in line


def test_the_return_so_far_is_in_the_picture(policy, tmp_path):
    best, _ = film_extremes(evaluate("Square", policy), policy, SEED, tmp_path, "one")
    _, pictures = pictures_in(best)
    line = pictures[:, 12:24, :70].astype(int)
    assert line.min() < 30 and line.max() > 220  # white on black
    changes = np.abs(np.diff(line, axis=0)).max((1, 2, 3))
    assert (changes > 60).all()


def test_a_fast_simulator_is_shown_as_fast_as_it_moves(policy, tmp_path):
    evaluation = evaluate("Square", policy, rate=125)
    lengths = [evaluation.lengths[index] for index in (evaluation.returns.argmax(), evaluation.returns.argmin())]
    assert any(length % 3 for length in lengths)
    for path, length in zip(film_extremes(evaluation, policy, SEED, tmp_path, "one"), lengths, strict=True):
        about, pictures = pictures_in(path)
        assert about["fps"] == pytest.approx(125 / 3, abs=0.01)
        assert len(pictures) == len({*range(0, length + 1, 3), length})  # the last one too
        np.testing.assert_allclose(pictures[-1, -10:, -10:].mean((0, 1))[1], 0, atol=12)


def test_one_episode_has_one_video(policy, tmp_path):
    assert [one.name for one in film_extremes(evaluate("Square", policy, 1), policy, SEED, tmp_path, "a")] == [
        "a-best.mp4"
    ]


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def no_backend_chosen(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")


def test_an_environment_without_pictures_is_refused_before_any_episode(no_backend_chosen):
    with pytest.raises(SimulatorError, match=r"Blind-v0 draws no pictures: its render modes are human, ansi"):
        prepare_video(EnvironmentSpec.of("pictures:Blind-v0"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), [("Unpainted", "no paint"), ("Killed", "the process that tried it ended")])
def test_what_cannot_be_drawn_is_told_in_one_line_with_what_to_install(name, reason, no_backend_chosen):
    with pytest.raises(SimulatorError) as error:
        prepare_video(EnvironmentSpec.of(f"pictures:{name}-v0"))
    (line,) = str(error.value).splitlines()
    for part in (f"MUJOCO_GL=egl: {reason}", f"MUJOCO_GL=osmesa: {reason}", "libegl1", "libosmesa6"):
        assert part in line
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.slow
def test_a_way_to_draw_that_is_given_is_kept(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    prepare_video(EnvironmentSpec.of("pictures:Square-v0"))
    assert os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "nothing")
    with pytest.raises(SimulatorError, match=r"MUJOCO_GL=nothing: .*invalid value") as error:
        prepare_video(EnvironmentSpec.of("Hopper-v5"))
    assert "MUJOCO_GL=egl" not in str(error.value)


def test_an_episode_that_does_not_repeat_itself_is_not_shown_as_another(policy, tmp_path):
    with pytest.raises(SimulatorError, match=r"Moody-v0 does not repeat an episode: with seed \d+ the return was"):
        film_extremes(evaluate("Moody", policy), policy, SEED, tmp_path / "videos", "one")
    assert not (tmp_path / "videos").exists()


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'iql_torchrl\[video\]'"):
        prepare_video(EnvironmentSpec.of("pictures:Square-v0"))


def test_a_folder_that_cannot_be_written_is_named(policy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"output=.*file/videos cannot be written"):
        film_extremes(evaluate("Square", policy), policy, SEED, tmp_path / "file" / "videos", "one")


# -------------------------------------------------------------------------------------------------- as a user has it


@pytest.mark.slow
def test_the_recipe_writes_two_videos_of_its_own_evaluation_beside_the_checkpoint(tmp_path):
    run("iql_offline.py", *SMALL, "train.steps=20", "run_dir=run", cwd=tmp_path)
    process = start("evaluate.py", "checkpoint=run", "episodes=3", "video=true", cwd=tmp_path)
    code, out, error = finish(process)
    if code == 2 and "no picture of Hopper-v5 can be drawn" in error:
        pytest.skip(error)
    assert code == 0 and not error, error
    lowest, highest = re.search(r"lowest, highest +([-\d.]+), ([-\d.]+)", out).groups()
    told = re.findall(r"^  (best|worst) +([-\d.]+), seed \d: (\S+)$", out, flags=re.MULTILINE)
    assert [(name, found) for name, found, _ in told] == [("best", highest), ("worst", lowest)]
    folder = tmp_path / "run" / "checkpoints" / "videos"
    assert sorted(folder.iterdir()) == [folder / "step-00000020-best.mp4", folder / "step-00000020-worst.mp4"]
    for _, _, path in told:
        about, pictures = pictures_in(tmp_path / path)
        assert about["size"] == (480, 480) and pictures.std((1, 2, 3)).min() > 20
        assert not np.array_equal(pictures[0], pictures[-1])
