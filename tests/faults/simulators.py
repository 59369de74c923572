"""Simulators that fail: registered as ``faults.simulators:Failing-v0``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv


class Failing(PendulumEnv):
    """A pendulum whose step fails, in a way, as often as the file ``left`` says.

    Args:
        how: ``exit``, ``kill``, ``hang``, ``raise`` or ``not_a_number``.
        left: a file with the number of failures to come.
    """

    def __init__(self, how: str, left: str) -> None:
        super().__init__()
        self.how, self.left = how, Path(left)

    def step(self, action):
        count = int(self.left.read_text())
        if count and self.np_random.random() < 0.1:
            self.left.write_text(str(count - 1))
            if self.how == "exit":
                os._exit(7)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raise":
                raise RuntimeError("the simulator is unstable")
            if self.how == "not_a_number":
                return np.full(3, np.nan, np.float32), 0.0, False, False, {}
            time.sleep(3600)
        return super().step(action)


gymnasium.register("Failing-v0", entry_point=Failing, max_episode_steps=200)
