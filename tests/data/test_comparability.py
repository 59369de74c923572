"""Which scores compare: real Minari sets recorded here, D4RL's files by their names, logs of the user's own."""

import json
import re

import gymnasium
import gymnasium_robotics
import minari
import pytest
from recordings import record
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.configuration.options import EnvironmentOptions
from iql_torchrl.data import comparability
from iql_torchrl.data.comparability import changes_between, published_name, remarks_on, with_marks
from iql_torchrl.data.preparation import environment_of, prepare_data
from iql_torchrl.data.sources import HDF5, Arrays, Embedded, MinariObject
from iql_torchrl.data.sources.d4rl import D4RL
from iql_torchrl.data.sources.minari import Minari
from iql_torchrl.environments.scores import normalised_score
from iql_torchrl.errors import SimulatorError
from iql_torchrl.running.options import OfflineOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*(out of date|is set to None|more recent).*")
gymnasium.register_envs(gymnasium_robotics)

MEDIUM = "mujoco/hopper/medium-v0"


def prepared(source, environment="auto", **kwargs):
    with initialised():
        options = compose("iql_offline", [], OfflineOptions, quiet=True)
    return prepare_data(source, options.algorithm, EnvironmentOptions(name=environment, kwargs=kwargs or None))


def remarks(source, environment="auto", **kwargs):
    spec, _ = environment_of(source, EnvironmentOptions(name=environment, kwargs=kwargs or None))
    return remarks_on(source, spec, 100.0)


def marks(*given, **kwargs):
    return [remark.mark for remark in remarks(*given, **kwargs)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of Minari's, with sets of random episodes of Hopper and of a cheetah that is cut early."""
    root = tmp_path_factory.mktemp("minari")
    for name in (MEDIUM, "mujoco/hopper/simple-v0", "test/hopper-v0", "Hopper-v5/medium-v0"):
        record(name, gymnasium.make("Hopper-v5"), root, 3)
    record("mujoco/walker2d/expert-v2", gymnasium.make("Walker2d-v5"), root, 2)
    record("mujoco/halfcheetah/random-v0", gymnasium.make("HalfCheetah-v5", max_episode_steps=30), root, 2)
    record("test/skipping-v0", gymnasium.make("Hopper-v5", frame_skip=2), root, 2)
    record("D4RL/pen/human-v2", gymnasium.make("AdroitHandPen-v1", max_episode_steps=20), root, 2)
    return root


def minaris(name, root, **metadata):
    if metadata:
        path = root / name / "data" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | metadata))
    return Minari(name=name, root=str(root), download=False)


# ---- Minari's recordings are not D4RL's


def test_minaris_set_of_the_name_of_one_of_d4rls_is_told_from_it_with_the_returns_of_both(root):
    data = prepared(minaris(MEDIUM, root))
    mark = "Minari's, not D4RL's hopper-medium-v2"
    assert data.title == f"IQL on {MEDIUM} ({mark})" and data.description().startswith(data.title)
    mean = data.returns.mean()
    scores = [normalised_score("hopper-medium-v2", one) for one in (mean, 1422.06)]
    assert (
        data.warnings[0]
        == data.remarks[0].sentence
        == (
            f"{MEDIUM} is {mark}: recorded in Hopper-v5 and evaluated in Hopper-v5, D4RL's recorded in Hopper-v2. Its "
            f"episodes return {mean:.1f} on average, those of D4RL's hopper-medium-v2 1,422.1 ({scores[0]:.1f} and "
            f"{scores[1]:.1f} as D4RL's normalised scores). Scores do not compare with those published on D4RL's."
        )
    )
    assert data.published_name is None and data.environment.references is not None


def test_it_is_told_without_a_simulator_too(root):
    (remark,) = remarks(minaris(MEDIUM, root), None)
    assert "recorded in Hopper-v5, D4RL's recorded in Hopper-v2" in remark.sentence


def test_a_set_that_a_program_holds_is_told_too(root, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    data = prepared(MinariObject(dataset=minari.load_dataset(MEDIUM)))
    assert data.title == f"IQL on {MEDIUM} (Minari's, not D4RL's hopper-medium-v2)"
    assert "recorded in Hopper-v5" in data.warnings[0]


def test_normalised_scores_by_the_sets_own_references_are_told(tmp_path):
    record(MEDIUM, gymnasium.make("Hopper-v5"), tmp_path, 2)
    (remark,) = remarks(minaris(MEDIUM, tmp_path, ref_min_score=-5.0, ref_max_score=4000.0))
    assert remark.sentence.endswith("Normalised scores are by the set's own references, -5.0 and 4,000.0.")


@pytest.mark.parametrize(
    "name", ["mujoco/hopper/simple-v0", "test/hopper-v0", "Hopper-v5/medium-v0", "D4RL/pen/human-v2"]
)
def test_sets_that_are_not_called_as_one_of_d4rls_have_no_remark(name, root):
    assert remarks(minaris(name, root)) == []


def test_a_set_recorded_in_version_5_and_evaluated_in_4_is_told(root):
    data = prepared(minaris("mujoco/walker2d/expert-v2", root), "Walker2d-v4")
    assert data.title.endswith("(Minari's, not D4RL's walker2d-expert-v2; Walker2d-v5 data in Walker2d-v4)")
    assert "recorded in Walker2d-v5 and evaluated in Walker2d-v4" in data.warnings[0]
    assert "the same friction at both feet; scores do not compare" in data.warnings[1]
    assert data.score_label == "normalised score" and data.data_score is not None


def test_a_set_for_evaluation_in_a_later_version_is_told(tmp_path):
    record("test/hopper-v0", gymnasium.make("Hopper-v4"), tmp_path, 2)
    later = gymnasium.spec("Hopper-v5").to_json()
    source = minaris("test/hopper-v0", tmp_path, eval_env_spec=later)
    assert marks(source) == ["Hopper-v4 data in Hopper-v5"]
    assert marks(minaris("test/hopper-v0", tmp_path, eval_env_spec=gymnasium.spec("Swimmer-v5").to_json())) == []


def test_an_environment_in_the_metadata_that_is_refused_does_not_matter_to_who_names_another(tmp_path):
    record("test/hopper-v0", gymnasium.make("Hopper-v5"), tmp_path, 2)
    refused = gymnasium.spec("Hopper-v5").to_json().replace('"id": "Hopper-v5"', '"id": "os:Hopper-v5"')
    source = minaris("test/hopper-v0", tmp_path, env_spec=refused)
    with pytest.raises(SimulatorError, match="os:Hopper-v5"):
        prepared(source)
    data = prepared(source, "Hopper-v5")
    assert data.remarks == () and data.score_label == "normalised score"


# ---- D4RL's data


@pytest.mark.parametrize(("task", "name"), [("hopper", "Hopper"), ("walker2d", "Walker2d"), ("ant", "Ant")])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_d4rls_locomotion_is_told_to_come_from_version_2(task, name, version):
    (remark,) = remarks(D4RL(name=f"{task}-medium-v{version}"))
    assert remark.mark == f"{name}-v2 data in {name}-v4"
    assert "MuJoCo's own bindings in place of mujoco-py; scores are close, not the same" in remark.sentence
    assert (f"those of D4RL's {task}-medium-v2" in remark.sentence) == (version == 2)


def test_a_file_of_d4rl_has_its_mean_return_beside_the_published_one(write_log, log_arrays, tmp_path):
    path = write_log(log_arrays(60, observation_dim=11, action_dim=3, terminals=[19, 39, 59]))
    data = prepared(D4RL(name="hopper-medium-replay-v2", url=path.as_uri(), root=str(tmp_path / "cache")))
    assert data.title == "IQL on hopper-medium-replay-v2 (Hopper-v2 data in Hopper-v4)"
    assert f"return {data.returns.mean():.1f} on average, those of D4RL's hopper-medium-replay-v2 467.3 (" in shown(
        data
    )
    assert data.published_name == "hopper-medium-replay-v2"


def shown(data):
    return "\n".join(data.warnings)


@pytest.mark.parametrize("name", sorted(D4RL_DATASETS))
def test_only_locomotion_has_a_remark_where_nothing_else_is_asked_for(name):
    source = D4RL(name=name)
    spec, _ = environment_of(source, EnvironmentOptions(name="auto", kwargs=None))
    locomotion = re.match("hopper|halfcheetah|walker2d|ant-", name)
    assert len(remarks_on(source, spec, 1.0)) == bool(locomotion)
    assert published_name(source, spec) == (None if spec is None else name)


def test_the_published_means_are_of_d4rls_sets_and_have_their_sources():
    content = json.loads((comparability.files("iql_torchrl.data") / "d4rl_returns.json").read_text())
    means = {one["name"]: one["mean_return"] for one in content["sets"]}
    assert len(means) == len(content["sets"]) == 20 and set(means) < set(D4RL_DATASETS)
    assert all(one["sources"] and set(one["sources"]) <= set(content["sources"]) for one in content["sets"])
    assert all(source["what"] and source["where"] for source in content["sources"].values())
    for task in ("hopper", "halfcheetah", "walker2d", "ant"):
        order = ("random", "medium", "medium-expert", "expert")
        levels = [means[f"{task}-{level}-v2"] for level in order]
        assert levels == sorted(levels) and levels[0] < means[f"{task}-medium-replay-v2"] < levels[1]


# ---- another environment than the data's


@pytest.mark.parametrize(
    ("data", "chosen", "mark"),
    [
        ("halfcheetah-medium-v2", "Walker2d-v4", "HalfCheetah-v2 data in Walker2d-v4"),
        ("halfcheetah-medium-v2", "Hopper-v4", "HalfCheetah-v2 data in Hopper-v4"),
        ("antmaze-umaze-v2", "AntMaze_Large-v4", "AntMaze_UMaze-v4 data in AntMaze_Large-v4"),
        ("pen-human-v1", "AdroitHandDoor-v1", "AdroitHandPen-v1 data in AdroitHandDoor-v1"),
        ("kitchen-mixed-v0", "Hopper-v5", "FrankaKitchen-v1 data in Hopper-v5"),
    ],
)
def test_another_task_has_no_normalised_score_and_no_published_ones(data, chosen, mark):
    source = D4RL(name=data)
    spec, note = environment_of(source, EnvironmentOptions(name=chosen, kwargs=None))
    assert spec.references is None and not spec.scores_data and "not comparable" in note
    (remark,) = remarks_on(source, spec, 1.0)
    assert remark.mark == mark and "another task" in remark.sentence
    assert published_name(source, spec) is None


def test_the_returns_of_another_tasks_data_are_none_of_the_evaluations(write_log, log_arrays, tmp_path):
    path = write_log(log_arrays(60, observation_dim=17, action_dim=6, terminals=[19, 39, 59]))
    source = D4RL(name="halfcheetah-medium-v2", url=path.as_uri(), root=str(tmp_path / "cache"))
    data = prepared(source, "Walker2d-v4")
    assert data.score_label == "return" and data.data_score is None and data.score(7.0) == 7.0
    assert "mean" not in data.description() and "another task" in data.warnings[0]


@pytest.mark.parametrize(("chosen", "published"), [("Hopper-v4", "hopper-medium-v2"), ("Hopper-v5", None)])
def test_another_version_keeps_its_score_and_the_published_ones_are_beside_that_of_d4rls_alone(chosen, published):
    source = D4RL(name="hopper-medium-v2")
    spec, _ = environment_of(source, EnvironmentOptions(name=chosen, kwargs=None))
    assert spec.references is not None and marks(source, chosen) == [f"Hopper-v2 data in {chosen}"]
    assert published_name(source, spec) == published


def test_a_log_that_names_its_environment_is_told_from_another(write_log, log_arrays):
    arrays = log_arrays(60, observation_dim=17, action_dim=6, terminals=[59])
    source = HDF5(path=str(write_log(arrays, env_id="Walker2d-v5")))
    assert remarks(source) == [] == remarks(source, "Walker2d-v5") == remarks(source, None)
    assert marks(source, "Walker2d-v4") == ["Walker2d-v5 data in Walker2d-v4"]
    assert marks(source, "HalfCheetah-v5") == ["Walker2d-v5 data in HalfCheetah-v5"]
    assert marks(HDF5(path=str(write_log(arrays, "none.hdf5"))), "HalfCheetah-v5") == []


def test_a_cheetah_is_the_same_in_versions_4_and_5(write_log, log_arrays):
    source = HDF5(path=str(write_log(log_arrays(observation_dim=17, action_dim=6), env_id="HalfCheetah-v4")))
    assert changes_between("HalfCheetah-v4", "HalfCheetah-v5") == "" and remarks(source, "HalfCheetah-v5") == []


def test_versions_of_an_environment_that_is_not_known_may_differ():
    assert "may differ" in changes_between("Pendulum-v0", "Pendulum-v1")
    assert changes_between("Pendulum-v1", "module:Pendulum-v1") == ""
    assert changes_between("Hopper-v4", "Hopper-v5") == changes_between("Hopper-v5", "Hopper-v4") != ""


def test_the_embedded_data_and_a_programs_have_no_remark(log_arrays):
    assert remarks(Embedded()) == [] and prepared(Embedded()).title == "IQL on the embedded Hopper-v5 replay"
    assert marks(Embedded(), "Hopper-v4") == ["Hopper-v5 data in Hopper-v4"]
    assert remarks(Arrays(arrays=log_arrays(observation_dim=11)), "Hopper-v5") == []


# ---- the same environment with other arguments


def test_arguments_that_make_it_another_than_the_references_are_of_are_told(root):
    assert marks(D4RL(name="hopper-medium-v2"), max_episode_steps=50)[1:] == ["with max_episode_steps=50"]
    (remark,) = remarks(D4RL(name="door-human-v1"), max_episode_steps=50, reward_type="sparse")
    assert remark.mark == "with another reward_type, max_episode_steps=50"
    assert "references of the normalised score" in remark.sentence and "reward_type=sparse" in remark.sentence
    (remark,) = remarks(minaris("test/skipping-v0", root))
    assert remark.mark == "with frame_skip=2" and "references of the normalised score" in remark.sentence
    assert marks(minaris("mujoco/halfcheetah/random-v0", root))[1:] == ["with max_episode_steps=30"]
    source = D4RL(name="hopper-medium-v2")
    spec, _ = environment_of(source, EnvironmentOptions(name="auto", kwargs={"max_episode_steps": 50}))
    assert published_name(source, spec) is None


def test_arguments_that_change_no_score_are_not_told(tmp_path):
    given = {"max_episode_steps": 1000, "render_mode": "rgb_array", "camera_name": "track", "width": 64}
    assert len(remarks(D4RL(name="hopper-medium-v2"), **given)) == 1
    assert len(remarks(D4RL(name="ant-medium-v2"), use_contact_forces=False)) == 1
    # A set's own, where its own references are of them.
    record("test/skipping-v0", gymnasium.make("Hopper-v5", frame_skip=2), tmp_path, 2)
    source = minaris("test/skipping-v0", tmp_path, ref_min_score=0.0, ref_max_score=10.0)
    assert remarks(source) == [] and marks(source, frame_skip=4) == ["with frame_skip=4"]


def test_arguments_of_a_simulator_that_data_do_not_tell_of_are_nobodys_surprise(write_log, log_arrays):
    source = HDF5(path=str(write_log(log_arrays(observation_dim=3, action_dim=1))))
    assert remarks(source, "Pendulum-v1", g=3.0) == []
    assert marks(source, "Hopper-v5", frame_skip=2) == ["with frame_skip=2"]  # of which there is a normalised score


def test_marks_stand_behind_a_title():
    assert with_marks("IQL on x", []) == "IQL on x"
    one, other = comparability.Remark("a", "A."), comparability.Remark("b", "B.")
    assert with_marks("IQL on x", [one, other]) == "IQL on x (a; b)"
