"""Videos of the best and the worst episode of an evaluation, drawn without a display."""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iql_torchrl.atomic import write_atomically
from iql_torchrl.environments.pictures import choose_backend, make_with_pictures
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError, SimulatorError
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.evaluation.rollouts import Evaluation

_FRAMES_PER_SECOND = 60.0  # at most: a simulator of 125 steps a second shows each third one, as fast as it moves


def prepare_video(environment: EnvironmentSpec) -> None:
    """Make sure that an environment can be drawn and the video written, before any episode: :func:`choose_backend`.

    Raises:
        ConfigurationError: the package that writes videos is not installed.
        SimulatorError: the environment has no pictures, or nothing draws them.
    """
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ConfigurationError("video=true needs imageio-ffmpeg: pip install 'iql_torchrl[video]'.")
    choose_backend(environment)


def film_extremes(
    evaluation: Evaluation, policy: Policy, seed: int, folder: Path, stem: str, say: Callable[[str], object] = print
) -> list[Path]:
    """Play the best and the worst episode of an evaluation again, and write each as ``STEM-best.mp4``, ``-worst.mp4``.

    Args:
        evaluation: its environment must have been through :func:`prepare_video`.
        policy: that was evaluated.
        seed: of the first episode.
        folder: of the files, made where it is not there.
        stem: of their names.
        say: is told of each file.

    Returns:
        the files: one where all episodes have the same return.

    Raises:
        SimulatorError: an episode that does not repeat itself.
        ConfigurationError: the folder cannot be written.
    """
    returns = evaluation.returns
    episodes = {"best": int(returns.argmax()), "worst": int(returns.argmin())}
    if episodes["best"] == episodes["worst"]:
        del episodes["worst"]
    written = []
    for name, episode in episodes.items():
        path = folder / f"{stem}-{name}.mp4"
        title = f"{name} of {len(returns)} episodes, seed {seed + episode}"
        found, content = film(evaluation.environment, policy, seed + episode, title)
        if found != returns[episode]:
            raise SimulatorError(
                f"{evaluation.environment.name} does not repeat an episode: with seed {seed + episode} the return was "
                f"{returns[episode]:.6g}, and {found:.6g} when it was drawn; no video of it was written."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file, content=content: file.write(content))
        except OSError as error:
            raise ConfigurationError(f"output={folder} cannot be written: {error.strerror or error}.") from error
        say(f"  {name:<16}  {found:.1f}, seed {seed + episode}: {path}")
        written.append(path)
    return written


def film(environment: EnvironmentSpec, policy: Policy, seed: int, title: str) -> tuple[float, bytes]:
    """One episode as MP4, as fast as it moves, with the return so far in every picture.

    Args:
        environment, policy: who plays where.
        seed: of the episode.
        title: the first line in the pictures; the second is return and step.

    Returns:
        the return and the content of the file.
    """
    writers: Any = importlib.import_module("imageio_ffmpeg")
    with closing(make_with_pictures(environment)) as made, tempfile.TemporaryDirectory() as folder:
        rate = float(made.metadata.get("render_fps") or 30)
        stride = math.ceil(rate / _FRAMES_PER_SECOND)
        path = Path(folder) / "episode.mp4"
        total, writer = 0.0, None
        for step, total, over in _play(made, policy, seed):
            if step % stride and not over:
                continue
            picture = _captioned(made.render(), f"{title}\nreturn {total:.1f}, step {step}")
            if writer is None:
                size = picture.shape[1], picture.shape[0]
                writer = writers.write_frames(str(path), size, fps=rate / stride, macro_block_size=2, quality=8)
                writer.send(None)
            writer.send(picture)
        if writer is not None:
            writer.close()
        return total, path.read_bytes()


def _play(made: Any, policy: Policy, seed: int) -> Iterator[tuple[int, float, bool]]:
    """Steps and return so far, and whether that was the last step."""
    observation, total, step, over = made.reset(seed=seed)[0], 0.0, 0, False
    yield step, total, over
    while not over:
        observation, reward, terminated, truncated, _ = made.step(policy(observation))
        total, step, over = total + float(reward), step + 1, bool(terminated or truncated)
        yield step, total, over


def _captioned(picture: np.ndarray, text: str) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(picture, dtype=np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(10, image.height // 26))
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font)
    edge = max(4, image.height // 80)
    draw.rectangle((0, 0, right - left + 2 * edge, bottom - top + 2 * edge), fill="black")
    draw.multiline_text((edge - left, edge - top), text, fill="white", font=font)
    return np.asarray(image)
