"""Which environment a dataset is evaluated in, how its observations are laid out, and what counts as success."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from dataclasses import asdict

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text, Tuple
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from iql_torchrl.data.sources.d4rl import of_d4rl
from iql_torchrl.data.sources.minari import RecordedEnvironment, of_minari
from iql_torchrl.environments.observations import UnsupportedSpace, flat_size, flatten
from iql_torchrl.environments.simulators import make_environment, spaces_of
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import DatasetError, SimulatorError
from iql_torchrl.evaluation.rollouts import Evaluator

pytestmark = pytest.mark.filterwarnings("ignore:.*(out of date|share an object).*")
FLAT = Box(-1, 1, (3,), np.float32)
# D4RL's own sizes and step limits, one name a family and a few with a limit of their own.
OF_D4RL = {
    "hopper-medium-v2": ("Hopper-v4", 11, 3, 1000),
    "halfcheetah-medium-expert-v2": ("HalfCheetah-v4", 17, 6, 1000),
    "walker2d-medium-replay-v2": ("Walker2d-v4", 17, 6, 1000),
    "ant-medium-v2": ("Ant-v4", 111, 8, 1000),
    "antmaze-umaze-v2": ("AntMaze_UMaze-v4", 29, 8, 700),
    "antmaze-umaze-diverse-v0": ("AntMaze_UMaze-v4", 29, 8, 700),
    "antmaze-medium-play-v2": ("AntMaze_Medium-v4", 29, 8, 1000),
    "antmaze-large-diverse-v2": ("AntMaze_Large-v4", 29, 8, 1000),
    "maze2d-umaze-v1": ("PointMaze_UMaze-v3", 4, 2, 300),
    "maze2d-umaze-dense-v1": ("PointMaze_UMazeDense-v3", 4, 2, 300),
    "maze2d-open-v0": ("PointMaze_Open-v3", 4, 2, 150),
    "maze2d-large-v1": ("PointMaze_Large-v3", 4, 2, 800),
    "pen-human-v1": ("AdroitHandPen-v1", 45, 24, 100),
    "hammer-cloned-v1": ("AdroitHandHammer-v1", 46, 26, 200),
    "door-expert-v1": ("AdroitHandDoor-v1", 39, 28, 200),
    "door-human-longhorizon-v1": ("AdroitHandDoor-v1", 39, 28, 300),
    "relocate-human-v1": ("AdroitHandRelocate-v1", 39, 30, 200),
    "kitchen-complete-v0": ("FrankaKitchen-v1", 60, 9, 280),
    "kitchen-mixed-v0": ("FrankaKitchen-v1", 60, 9, 280),
}
OF_D4RL = {name: expected for name, expected in OF_D4RL.items() if name in D4RL_DATASETS}


class Showing(gymnasium.Env):
    """Samples of any observation space; truncated after three steps."""

    action_space = FLAT

    def __init__(self, observation_space):
        self.observation_space = observation_space
        self.shown = []

    def show(self):
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.show(), {}

    def step(self, action):
        self.steps += 1
        return self.show(), 0.0, False, self.steps == 3, {}


@pytest.fixture
def made():
    """Make environments and close them after the test."""
    environments = []

    def make(spec):
        environments.append(make_environment(spec))
        return environments[-1]

    yield make
    for environment in environments:
        environment.close()


def spec_of(name):
    spec, reason = of_d4rl(name)
    assert spec is not None, reason
    return spec


def one_hot(index, size):
    return [float(position == index) for position in range(size)]


def episode(environment, steps=5):
    """Observations of a seeded random episode."""
    environment.action_space.seed(0)
    found = [environment.reset(seed=3)[0]]
    found += [environment.step(environment.action_space.sample())[0] for _ in range(steps)]
    return found


# ---- layouts


def raw_episode(spec):
    """The same episode in the environment without its layout."""
    environment = gymnasium.make(spec.name, **spec.kwargs)
    try:
        return episode(environment)
    finally:
        environment.close()


def test_maze2d_sees_the_observation_alone(made):
    spec = spec_of("maze2d-umaze-v1")
    found = episode(made(spec))
    for vector, raw in zip(found, raw_episode(spec), strict=True):
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, raw["observation"], rtol=1e-6)


def test_antmaze_sees_where_it_is_and_then_its_joints(made):
    spec = spec_of("antmaze-umaze-v2")
    environment = made(spec)
    found = episode(environment)
    for vector, raw in zip(found, raw_episode(spec), strict=True):
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, [*raw["achieved_goal"], *raw["observation"]], rtol=1e-5, atol=1e-6)
    # D4RL's ant begins with its position on the plane: the simulator's own.
    ant = environment.unwrapped.ant_env
    np.testing.assert_allclose(found[-1][:15], ant.data.qpos, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[-1][15:], ant.data.qvel, rtol=1e-5, atol=1e-6)


PARTS = {
    "matrix": Box(-2, 2, (2, 3), np.float64),
    "button": Discrete(4),
    "dial": Discrete(3, start=-1),
    "levers": MultiDiscrete([2, 3]),
    "board": MultiDiscrete([[2, 3], [4, 5]]),
    "later_levers": MultiDiscrete([2, 3], start=[5, -2]),
    "lights": MultiBinary(3),
    "pair": Tuple((Box(-1, 1, (2,), np.float32), Discrete(2))),
    "robot": Dict(position=Box(-1, 1, (2,), np.float32), gripper=Dict(open=Discrete(2), angle=Box(0, 1, ()))),
}


def by_hand(element):
    """The vector of an element of ``PARTS``, part by part in the alphabetical order of their names."""
    board = element["board"]
    return [
        *(
            number
            for (row, column), size in zip([(0, 0), (0, 1), (1, 0), (1, 1)], [2, 3, 4, 5], strict=True)
            for number in one_hot(board[row][column], size)
        ),
        *one_hot(element["button"], 4),
        *one_hot(element["dial"] + 1, 3),
        *one_hot(element["later_levers"][0] - 5, 2),
        *one_hot(element["later_levers"][1] + 2, 3),
        *one_hot(element["levers"][0], 2),
        *one_hot(element["levers"][1], 3),
        *map(float, element["lights"]),
        *[element["matrix"][row][column] for row in range(2) for column in range(3)],
        *element["pair"][0],
        *one_hot(element["pair"][1], 2),
        float(element["robot"]["gripper"]["angle"]),
        *one_hot(element["robot"]["gripper"]["open"], 2),
        *element["robot"]["position"],
    ]


def test_parts_are_laid_out_in_the_order_of_their_names(register, made):
    environment = made(register("Parts-v0", lambda: Showing(Dict(PARTS))))
    assert environment.observation_space.shape == (14 + 4 + 3 + 5 + 5 + 3 + 6 + 4 + 5,)
    found = episode(environment, steps=3)
    for vector, element in zip(found, environment.unwrapped.shown, strict=True):
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, by_hand(element), rtol=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_each_part_by_itself_is_laid_out_as_among_others(name, register, made):
    environment = made(register("Part-v0", lambda: Showing(PARTS[name])))
    (size,) = environment.observation_space.shape
    assert size == flat_size(PARTS[name])
    first = environment.reset(seed=0)[0]
    element = environment.unwrapped.shown[0]
    rest = {key: space.sample() for key, space in PARTS.items()}
    everything = np.array(by_hand({**rest, name: element}), np.float32)
    start = sum(flat_size(PARTS[key]) for key in sorted(PARTS) if key < name)
    np.testing.assert_allclose(first, everything[start : start + size], rtol=1e-6)


def batched(elements):
    if isinstance(elements[0], dict):
        return {key: batched([element[key] for element in elements]) for key in elements[0]}
    if isinstance(elements[0], tuple):
        return tuple(batched(list(parts)) for parts in zip(*elements, strict=True))
    return np.array(elements)


@pytest.mark.parametrize("space", [Dict(PARTS), Tuple(tuple(PARTS.values()))], ids=["dict", "tuple"])
def test_a_batch_of_the_data_is_laid_out_as_the_environments_observations(space, register, made):
    environment = made(register("Parts-v0", lambda: Showing(space)))
    found = episode(environment, steps=3)
    rows = flatten(space, batched(environment.unwrapped.shown), 4)
    np.testing.assert_array_equal(np.stack(found), rows.astype(np.float32))


def test_the_order_in_which_a_space_lists_its_parts_does_not_matter(register, made):
    def listed(names):
        return Dict(OrderedDict((name, PARTS[name]) for name in names))

    spaces = [listed(sorted(PARTS)), listed(sorted(PARTS, reverse=True))]
    assert [list(space.spaces) for space in spaces] == [sorted(PARTS), sorted(PARTS, reverse=True)]
    element = spaces[0].sample()
    turned = dict(reversed(element.items()))
    vectors = []
    for number, (space, shown) in enumerate(zip(spaces, (element, turned), strict=True)):
        environment = Showing(space)
        environment.show = lambda shown=shown: shown
        vectors.append(made(register(f"Listed{number}-v0", lambda made=environment: made)).reset(seed=0)[0])
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize(
    ("space", "part"),
    [
        (Box(0, 255, (8, 8, 3), np.uint8), "observation is an image"),
        (Dict(camera=Box(0, 255, (8, 8, 3), np.uint8), position=FLAT), "observation/camera is an image"),
        (Dict(robot=Tuple((FLAT, Box(0, 255, (8, 8), np.uint8)))), "observation/robot/1 is an image"),
        (Text(5), r"observation is Text\("),
        (Dict(robot=Dict(order=Text(5))), r"observation/robot/order is Text\("),
        (Tuple((FLAT, Sequence(FLAT))), r"observation/1 is Sequence\("),
        (Dict(map=Graph(FLAT, None)), r"observation/map is Graph\("),
    ],
    ids=["image", "camera", "image-in-tuple", "text", "nested-text", "sequence", "graph"],
)
def test_a_part_that_is_no_vector_is_refused_by_its_name(space, part, register):
    register("Odd-v0", lambda: Showing(space))
    with pytest.raises(SimulatorError, match=rf"Odd-v0 has observation space .*: {part}.*env\.name=null"):
        make_environment("Odd-v0")


# ---- Kitchen in D4RL's layout


@pytest.mark.parametrize("name", ["kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0"])
def test_kitchen_shows_the_joints_and_the_goals_in_the_place_of_their_joints(name, made):
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_INDICES

    environment = made(spec_of(name))
    for observation in episode(environment, steps=2):
        kitchen = environment.unwrapped
        assert observation.shape == (60,) and observation.dtype == np.float32
        goal = np.zeros(30)
        for task, target in kitchen.goal.items():
            goal[OBS_ELEMENT_INDICES[task]] = target
        assert set(kitchen.goal) == set(spec_of(name).kwargs["tasks_to_complete"]) and len(kitchen.goal) == 4
        np.testing.assert_allclose(observation[30:], goal, rtol=1e-6)
        assert not np.delete(
            observation[30:], np.concatenate([OBS_ELEMENT_INDICES[task] for task in kitchen.goal])
        ).any()
    np.testing.assert_allclose(observation[:30], environment.unwrapped.data.qpos, atol=0.1)
    assert (observation[:9] != environment.unwrapped.data.qpos[:9].astype(np.float32)).all()


def test_kitchen_without_noise_shows_the_simulators_joint_positions(made):
    spec = spec_of("kitchen-complete-v0").with_kwargs({"robot_noise_ratio": 0.0, "object_noise_ratio": 0.0})
    environment = made(spec)
    environment.action_space.seed(0)
    observation, _ = environment.reset(seed=0)
    for _ in range(4):
        # The simulator's state is of the step that was observed: nothing moves between them.
        np.testing.assert_allclose(observation[:30], environment.unwrapped.data.qpos, rtol=0, atol=1e-6)
        observation, *_ = environment.step(environment.action_space.sample())


# ---- the environment of a D4RL dataset


@pytest.mark.parametrize(("name", "expected"), OF_D4RL.items(), ids=list(OF_D4RL))
def test_the_environment_of_a_d4rl_dataset_has_its_sizes_and_its_step_limit(name, expected, made):
    environment_name, observation_dim, action_dim, limit = expected
    spec = spec_of(name)
    assert spec.name == environment_name
    environment = made(spec)
    assert environment.observation_space.shape == (observation_dim,)
    assert environment.action_space.shape == (action_dim,)
    assert environment.spec.max_episode_steps == limit
    observation, _ = environment.reset(seed=0)
    assert observation.shape == (observation_dim,) and np.isfinite(observation).all()


@pytest.mark.parametrize("name", ["maze2d-umaze-v1", "pen-human-v1"])
def test_an_episode_that_does_not_end_by_itself_is_cut_at_d4rls_limit(name, made):
    environment = made(spec_of(name))
    environment.reset(seed=0)
    still = np.zeros(environment.action_space.shape, np.float32)
    steps, over = 0, False
    while not over:
        _, _, terminated, truncated, _ = environment.step(still)
        steps, over = steps + 1, terminated or truncated
    if terminated:
        assert name.startswith("pen") and steps < 100  # a dropped pen
    else:
        assert steps == OF_D4RL[name][3]


def test_every_dataset_of_d4rl_has_an_environment_that_exists_or_a_reason_for_none():
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    for name in D4RL_DATASETS:
        spec, reason = of_d4rl(name)
        if spec is None:
            assert reason, name
        else:
            assert spec.name in gymnasium.registry and reason == "", name
            if spec.references is None or spec.layout == "d4rl_kitchen":
                assert spec.note, name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("antmaze-eval-umaze-v0", "no maze of this dataset's layout"),
        ("maze2d-eval-large-v1", "no maze of this dataset's layout"),
        ("carla-lane-v0", "CARLA"),
        ("flow-ring-random-v0", "traffic simulator"),
        ("minigrid-fourrooms-v0", "MiniGrid"),
        ("bullet-hopper-medium-v0", "PyBullet"),
    ],
)
def test_a_dataset_without_an_environment_says_why(name, reason):
    spec, found = of_d4rl(name)
    assert spec is None and reason in found


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "maze2d-umaze-v1"])
def test_mazes_have_no_score_and_say_why(name):
    spec = spec_of(name)
    assert spec.score(1.0) is None and spec.note.startswith("not comparable")


def test_kitchens_score_counts_the_tasks_and_is_none_of_the_datas():
    spec = spec_of("kitchen-mixed-v0")
    assert spec.score(3.0) == 75.0 and not spec.scores_data
    assert set(spec.kwargs["tasks_to_complete"]) == {"microwave", "kettle", "bottom burner", "light switch"}


# ---- the environment of a Minari dataset, and other arguments


def recorded(name, kwargs=None, limit=None, references=None):
    return RecordedEnvironment(name, kwargs or {}, limit, references)


def test_a_minari_dataset_is_evaluated_with_its_own_arguments_limit_and_references(made):
    spec, reason = of_minari("a/b-v0", recorded("Hopper-v5", {"frame_skip": 2}, 77, (-3.0, 17.0)))
    assert reason == "" and spec.score(7.0) == 50.0 and "metadata" in spec.note
    environment = made(spec)
    assert environment.unwrapped.frame_skip == 2 and environment.spec.max_episode_steps == 77


def test_a_minari_dataset_without_references_takes_d4rls_where_they_fit():
    assert of_minari("a/b-v0", recorded("Hopper-v5"))[0].score(3234.3) == pytest.approx(100)
    four = {"tasks_to_complete": ["microwave", "kettle", "light switch", "slide cabinet"]}
    assert of_minari("a/b-v0", recorded("FrankaKitchen-v1", four))[0].score(1.0) == 25.0
    one = {"tasks_to_complete": ["microwave"]}
    for name, kwargs in (("FrankaKitchen-v1", one), ("FrankaKitchen-v1", {}), ("PointMaze_UMaze-v3", {})):
        assert of_minari("a/b-v0", recorded(name, kwargs))[0].references is None


def test_a_minari_dataset_that_names_no_environment_has_none():
    spec, reason = of_minari("a/b-v0", None)
    assert spec is None and "a/b-v0" in reason


def test_other_arguments_replace_those_of_the_specification_and_leave_the_rest(made):
    spec = spec_of("pen-human-v1").with_kwargs({"max_episode_steps": 7, "reward_type": "sparse"})
    assert spec.kwargs == {"max_episode_steps": 7, "reward_type": "sparse"}
    environment = made(spec)
    assert environment.spec.max_episode_steps == 7 and environment.unwrapped.sparse_reward
    ant = EnvironmentSpec.of("Ant-v4").with_kwargs({"max_episode_steps": 7})
    assert ant.kwargs == {"use_contact_forces": True, "max_episode_steps": 7}
    assert spaces_of(ant, observation_dim=111, action_dim=8).observation_dim == 111


def test_no_other_arguments_leave_the_specification_as_it_is():
    spec = spec_of("kitchen-complete-v0")
    assert spec.with_kwargs({}) == spec and spec_of("kitchen-complete-v0") == spec


@pytest.mark.parametrize("name", ["kitchen-complete", "kitchen-foo-v0", "hopper", "antmaze-huge-v0", ""])
def test_a_name_that_is_none_of_d4rls_is_refused_as_that_and_not_as_an_environment(name):
    with pytest.raises(DatasetError, match="unknown D4RL dataset"):
        of_d4rl(name)


# ---- large spaces


def test_a_discrete_observation_of_many_values_is_one_hot_without_a_table_of_its_square():
    tracemalloc.start()
    found = flatten(Discrete(50_000, start=7), np.array([7, 50_006]), 2)
    assert tracemalloc.get_traced_memory()[1] < 10 * found.nbytes
    tracemalloc.stop()
    assert found.shape == (2, 50_000) and found[0, 0] == found[1, -1] == 1 and found.sum() == 2


@pytest.mark.parametrize("space", [Box(0, 1, (8, 8, 3)), Box(0, 255, (8, 8), np.uint8), Dict(), Tuple(())])
def test_arrays_that_look_like_images_and_spaces_of_nothing_are_refused(space):
    with pytest.raises(UnsupportedSpace, match="observation"):
        flat_size(space)


# ---- from files


def test_a_checkpoints_environment_is_the_runs_again():
    spec, _ = of_d4rl("kitchen-mixed-v0")
    assert EnvironmentSpec.from_state(asdict(spec)) == spec
    assert EnvironmentSpec.from_state("Ant-v4") == EnvironmentSpec.of("Ant-v4")


@pytest.mark.parametrize("state", ["os:Door-v0", {"name": "os:Door-v0", "kwargs": {}}])
def test_a_file_cannot_ask_for_a_module(state):
    with pytest.raises(SimulatorError, match=r"os:Door-v0.*module to import.*env\.name"):
        EnvironmentSpec.from_state(state)


@pytest.mark.parametrize(
    ("kwargs", "comparable"),
    [
        ({"tasks_to_complete": ["kettle", "microwave", "light switch", "slide cabinet"]}, True),
        ({"tasks_to_complete": ["kettle"]}, False),
        ({}, False),
        ({"tasks_to_complete": ["kettle"] * 4, "remove_task_when_completed": False}, False),
    ],
)
def test_kitchens_score_is_of_four_tasks_that_each_pay_once(kwargs, comparable):
    for spec in (
        EnvironmentSpec.of("FrankaKitchen-v1", kwargs),
        EnvironmentSpec.of("FrankaKitchen-v1", {"max_episode_steps": 5}).with_kwargs(kwargs),
        of_minari("D4RL/kitchen/x-v0", RecordedEnvironment("FrankaKitchen-v1", dict(kwargs), None, None))[0],
    ):
        assert (spec.score(2.0) == 50) if comparable else (spec.score(2.0) is None and "not comparable" in spec.note)


# ---- success


class Reporting(gymnasium.Env):
    """Five steps; the information of each is ``infos(seed, step)``."""

    observation_space = action_space = FLAT

    def __init__(self, infos):
        self.infos = infos

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        return np.zeros(3, np.float32), {"success": True, "tasks_to_complete": []}

    def step(self, action):
        self.steps += 1
        return np.zeros(3, np.float32), 0.0, False, self.steps == 5, self.infos(self.seed, self.steps)


@pytest.mark.parametrize(
    ("infos", "expected"),
    [
        (lambda seed, step: {"success": seed % 4 == 1 and step == 3}, [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]),
        (lambda seed, step: {"success": np.bool_(seed < 3)} if step == 5 else {}, [1] * 3 + [0] * 7),
        (lambda seed, step: {"success": np.array([float(step == 1)])}, [1] * 10),
        (lambda seed, step: {"success": False}, [0] * 10),
        (lambda seed, step: {"is_success": float(seed == 2)}, [0, 0, 1] + [0] * 7),
        (
            lambda seed, step: {"tasks_to_complete": ["kettle"], "episode_task_completions": ["kettle"] * (step > 2)},
            [1] * 10,
        ),
        (
            lambda seed, step: {"tasks_to_complete": ["kettle", "light"], "episode_task_completions": ["light"]},
            [0] * 10,
        ),
        (lambda seed, step: {"tasks_to_complete": ["kettle"] * (seed != 6 or step < 4)}, [0] * 6 + [1] + [0] * 3),
        (lambda seed, step: {"tasks_to_complete": set() if step == 2 else {"kettle"}}, [1] * 10),
        (lambda seed, step: {"distance": 0.0}, None),
    ],
    ids=[
        "one-step",
        "last-step",
        "array",
        "never",
        "fetch",
        "kept",
        "kept-partly",
        "tasks",
        "tasks-come-back",
        "nothing",
    ],
)
def test_an_episode_succeeds_when_any_of_its_steps_reports_success(infos, expected, register):
    register("Reporting-v0", lambda: Reporting(infos))
    evaluator = Evaluator("Reporting-v0", episodes=10)
    found = evaluator.evaluate(lambda observations: np.zeros((len(observations), 3), np.float32))
    evaluator.close()
    if expected is None:
        assert found.successes is None and found.success_rate is None and found.row()["success_rate"] is None
    else:
        assert found.successes.tolist() == [bool(success) for success in expected]
        assert found.success_rate == found.row()["success_rate"] == pytest.approx(sum(expected) / 10)


def test_success_is_told_apart_when_more_episodes_run_than_environments(register):
    register("Reporting-v0", lambda: Reporting(lambda seed, step: {"success": seed % 7 == 0 and step == 2}))
    evaluator = Evaluator("Reporting-v0", episodes=70, seed=0)
    found = evaluator.evaluate(lambda observations: np.zeros((len(observations), 3), np.float32))
    evaluator.close()
    assert np.flatnonzero(found.successes).tolist() == list(range(0, 70, 7))


# ---- without gymnasium-robotics

NAMES = ("AntMaze_UMaze-v4", "AdroitHandPen-v1", "FrankaKitchen-v1", "PointMaze_UMaze-v3")
NOT_THERE = {
    "none in sys.modules": "import sys; sys.modules['gymnasium_robotics'] = None",
    "nowhere on the path": """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *options: None if name == "gymnasium_robotics" else find(name, *options)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("hide", NOT_THERE.values(), ids=list(NOT_THERE))
def test_without_gymnasium_robotics_the_message_names_the_extra_that_installs_it(hide):
    program = f"""
{hide}
from iql_torchrl.errors import DatasetError, SimulatorError
from iql_torchrl.environments.simulators import make_environment
make_environment("Hopper-v5").close()
for name in {NAMES}:
    try:
        make_environment(name)
    except SimulatorError as error:
        print(error)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for name, line in zip(NAMES, out.splitlines(), strict=True):
        assert line.startswith(f"environment {name} needs gymnasium-robotics: pip install 'iql_torchrl[robotics]'")
        assert "env.name=null" in line
