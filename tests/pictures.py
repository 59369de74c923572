"""Environments that draw themselves, which a new process finds by the name of this module: ``pictures:Square-v0``."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box

SIZE = 66, 100  # height, width


class Square(gymnasium.Env):
    """A coloured square; episodes of 2 to 21 steps, of which each pays a number that the seed draws."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = Box(-np.inf, np.inf, (5,), np.float32)
    action_space = Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))

    def __init__(self, render_mode=None, rate=25):
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "render_fps": rate}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.pay = int(self.np_random.integers(2, 22)), float(self.np_random.normal())
        return self.observe(), {}

    def observe(self):
        return np.full(5, self.left, np.float32)

    def step(self, action):
        self.left -= 1
        return self.observe(), self.pay + 0.01 * float(action[0]), False, self.left == 0, {}

    def render(self):
        return np.full((*SIZE, 3), (200, 10 * self.left, 0), np.uint8)


class Blind(Square):
    metadata = {"render_modes": ["human", "ansi"]}

    def reset(self, *, seed=None, options=None):
        raise AssertionError("an episode was begun")


class Unpainted(Square):
    def render(self):
        raise RuntimeError("no paint\nand no brush")


class Killed(Square):
    def render(self):
        import os

        os.abort()


class Moody(Square):
    """Pays more every time."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed, options=options)
        type(self).episodes += 1
        self.pay += type(self).episodes
        return found


for kind in (Square, Blind, Unpainted, Killed, Moody):
    gymnasium.register(f"{kind.__name__}-v0", entry_point=kind)
