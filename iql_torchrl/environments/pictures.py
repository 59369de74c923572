"""Pictures of environments without a display."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from iql_torchrl.environments.simulators import make_environment
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import SimulatorError, first_line

_BACKENDS = ("egl", "osmesa")  # of MuJoCo, that need no display


def choose_backend(environment: EnvironmentSpec) -> None:
    """Find out, in another process, what draws an environment here, and set ``MUJOCO_GL`` to it.

    OpenGL takes one way to draw for the whole of a process, when the first picture is drawn: call this before. A
    ``MUJOCO_GL`` that is set already is kept. EGL is tried before OSMesa.

    Raises:
        SimulatorError: the environment has no pictures, or nothing draws them.
    """
    with closing(make_environment(environment)) as made:
        modes = made.metadata.get("render_modes") or []
    if "rgb_array" not in modes:
        raise SimulatorError(
            f"{environment.name} draws no pictures: its render modes are {', '.join(map(str, modes)) or 'none'}, and a "
            "video needs rgb_array; leave video=true out."
        )
    given = os.environ.get("MUJOCO_GL")
    failures = []
    for backend in [given] if given else _BACKENDS:
        os.environ["MUJOCO_GL"] = backend
        failure = _failure_in_a_process(environment)
        if failure is None:
            return
        failures.append(f"MUJOCO_GL={backend}: {failure}")
    if not given:
        del os.environ["MUJOCO_GL"]
    raise SimulatorError(
        f"no picture of {environment.name} can be drawn ({'; '.join(failures)}); MuJoCo's environments need EGL or "
        "OSMesa: apt-get install libegl1, or libosmesa6; or leave video=true out."
    )


def make_with_pictures(environment: EnvironmentSpec) -> Any:
    """As :func:`~iql_torchrl.environments.simulators.make_environment`, with pictures that follow what walks."""
    made: Any = make_environment(environment.with_kwargs({"render_mode": "rgb_array"}))
    renderer = getattr(made.unwrapped, "mujoco_renderer", None)
    if renderer is not None and not any("camera" in name for name in environment.kwargs):
        # Gymnasium 1.4 does not take it by itself, and what walks leaves the picture.
        mujoco: Any = importlib.import_module("mujoco")
        follows = mujoco.mj_name2id(made.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        renderer.camera_id = follows if follows != -1 else renderer.camera_id
    return made


def _failure_in_a_process(environment: EnvironmentSpec) -> str | None:
    """Why an environment cannot be drawn with the present ``MUJOCO_GL``; ``None`` where it can."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_draw_one, args=(theirs, environment), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return f"the process that tried it ended with {process.exitcode}"
    finally:
        ours.close()
        process.join()


def _draw_one(connection: Connection, environment: EnvironmentSpec) -> None:
    try:
        made = make_with_pictures(environment)
        made.reset(seed=0)
        picture = np.asarray(made.render())
        failure = None if picture.ndim == 3 and picture.shape[2] == 3 else f"a picture of shape {picture.shape}"
        made.close()
    except Exception as error:  # of MuJoCo, OpenGL, pygame or the environment itself
        failure = first_line(error, 200)
    connection.send(failure)
    connection.close()
    os._exit(0)  # what is left of OpenGL complains when it is taken apart
