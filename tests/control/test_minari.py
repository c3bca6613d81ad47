"""Data sets of Minari: read from files that Minari itself wrote, and refused where they lead elsewhere."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import policygrad as pg
from policygrad.control.demonstrations import transitions
from policygrad.control.minari import place_of, read_minari
from policygrad.errors import UserError

h5py = pytest.importorskip("h5py")


def episodes() -> list[dict[str, np.ndarray]]:
    """Two episodes as Minari lays them out: one observation more than actions."""
    generator = np.random.default_rng(0)
    return [
        {
            "observations": generator.normal(size=(n + 1, 3)).astype(np.float32),
            "actions": generator.integers(2, size=n),
            "rewards": generator.normal(size=n),
            "terminations": np.arange(n) == n - 1,
            "truncations": np.zeros(n, dtype=bool),
        }
        for n in (4, 2)
    ]


def written(path: Path, found: list[dict[str, Any]]) -> Path:
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(found):
            for name, values in episode.items():
                file.create_dataset(f"episode_{i}/{name}", data=values)
            file.create_group(f"episode_{i}/infos")
    return path


def test_the_columns_are_those_of_all_episodes_without_their_last_observations(tmp_path: Path) -> None:
    first, second = episodes()
    found = read_minari(written(tmp_path / "main_data.hdf5", [first, second]))
    np.testing.assert_array_equal(
        found["observation"], np.concatenate([first["observations"][:4], second["observations"][:2]])
    )
    np.testing.assert_array_equal(found["action"], np.concatenate([first["actions"], second["actions"]]))
    np.testing.assert_array_equal(found["reward"], np.concatenate([first["rewards"], second["rewards"]]))
    assert found["episode"].tolist() == [0] * 4 + [1] * 2
    assert found["terminated"].tolist() == [False, False, False, True, False, True]


def test_episodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    many = [episodes()[1] for _ in range(11)]
    for i, episode in enumerate(many):
        episode["rewards"] = np.full(2, float(i))
    assert read_minari(written(tmp_path / "x.hdf5", many))["reward"].tolist() == [
        float(i) for i in range(11) for _ in "ab"
    ]


def test_what_minari_collects_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("jax", reason="Minari collects with it")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gymnasium.make("CartPole-v1"), data_format="hdf5")
    actions: list[int] = []
    for seed in range(2):
        collector.reset(seed=seed)
        ended = False
        while not ended:
            actions.append(int(collector.action_space.sample()))
            _, _, terminated, truncated, _ = collector.step(actions[-1])
            ended = terminated or truncated
    collector.create_dataset("cartpole/random-v0")
    found = read_minari(place_of("minari:cartpole/random-v0"))
    assert found["action"].tolist() == actions
    assert found["observation"].shape == (len(actions), 4)
    assert found["terminated"].sum() == 2
    assert [x.dtype.kind for x in found.values()].count("O") == 0


def linked(path: Path) -> Path:
    """A file whose actions are in another file, by a link."""
    first, second = episodes()
    written(path.with_name("other.hdf5"), [first])
    actions = first.pop("actions")
    assert len(actions)
    written(path, [first, second])
    with h5py.File(path, "a") as file:
        file["episode_0/actions"] = h5py.ExternalLink("other.hdf5", "episode_0/actions")
    return path


def virtual(path: Path) -> Path:
    """A file whose actions are in another file, as a virtual data set."""
    first, second = episodes()
    written(path.with_name("other.hdf5"), [first])
    first.pop("actions")
    written(path, [first, second])
    with h5py.File(path, "a") as file:
        layout = h5py.VirtualLayout(shape=(4,), dtype=np.int64)
        layout[:] = h5py.VirtualSource(str(path.with_name("other.hdf5")), "episode_0/actions", shape=(4,))
        file.create_virtual_dataset("episode_0/actions", layout)
    return path


def external(path: Path) -> Path:
    """A file whose actions are the raw bytes of another file."""
    first, second = episodes()
    path.with_name("raw").write_bytes(first.pop("actions").tobytes())
    written(path, [first, second])
    with h5py.File(path, "a") as file:
        file.create_dataset("episode_0/actions", (4,), np.int64, external=[(str(path.with_name("raw")), 0, 32)])
    return path


def large(path: Path) -> Path:
    """A small file that unpacks to more than there is memory for."""
    written(path, episodes())
    with h5py.File(path, "a") as file:
        file.create_dataset("episode_0/infos/zeros", (2**40,), np.float64, chunks=(2**16,), compression="gzip")
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [(linked, "'actions' is a link"), (virtual, "in another file"), (external, "in another file"), (large, "2 GiB")],
)
def test_a_file_that_leads_out_of_itself_or_unpacks_to_too_much_is_refused(
    make: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        read_minari(make(tmp_path / "main_data.hdf5"))
    assert len(str(raised.value)) <= 200


WRONG: list[tuple[Any, str]] = [
    (lambda x: x.pop("actions"), "no actions"),
    (lambda x: x.update(observations={"a": 1}), "no observations"),
    (lambda x: x.update(actions=x["actions"][:1]), "differ in length"),
    (lambda x: x.update(actions=np.array(["a", "b"], dtype="S1")), "no numbers"),
    (lambda x: x.update(observations=np.zeros((3, 2))), "differ in shape"),
]


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_episodes_that_make_no_sense_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    first, second = episodes()
    change(second)
    second.pop("observations") if isinstance(second.get("observations"), dict) else None
    with pytest.raises(UserError, match=said) as raised:
        read_minari(written(tmp_path / "main_data.hdf5", [first, second]))
    assert len(str(raised.value)) <= 200


SEEN = spaces.Dict(
    place=spaces.Box(-9, 9, (2,), np.float64), room=spaces.Tuple([spaces.Discrete(3), spaces.Discrete(2)])
)
TAKEN = spaces.Tuple([spaces.Dict(turn=spaces.Discrete(4, start=2)), spaces.Box(-1, 1, (1,), np.float64)])


class Rooms(gymnasium.Env):
    """Observations of a Dict and actions of a Tuple, with others in them."""

    observation_space, action_space = SEEN, TAKEN

    def reset(self, **options: Any) -> Any:
        super().reset(seed=options.get("seed"))
        return SEEN.sample(), {}

    def step(self, action: Any) -> Any:
        assert TAKEN.contains(action)
        return SEEN.sample(), 0.0, bool(self.np_random.random() < 0.3), False, {}


def in_groups(path: Path, found: list[tuple[list[Any], list[Any]]]) -> Path:
    """Observations and actions of these episodes as Minari lays out what has parts: groups, a tuple's by _index_i."""

    def put(group: Any, name: str, values: list[Any]) -> None:
        if isinstance(values[0], dict | tuple):
            inner = group.create_group(name)
            for key in values[0] if isinstance(values[0], dict) else range(len(values[0])):
                called = key if isinstance(values[0], dict) else f"_index_{key}"
                put(inner, called, [x[key] for x in values])
        else:
            group.create_dataset(name, data=np.stack([np.asarray(x) for x in values]))

    with h5py.File(path, "w") as file:
        for i, (seen, taken) in enumerate(found):
            group = file.create_group(f"episode_{i}")
            put(group, "observations", seen)
            put(group, "actions", taken)
            for name in ("rewards", "terminations", "truncations"):
                group.create_dataset(name, data=np.zeros(len(taken)))
    return path


def rooms() -> list[tuple[list[Any], list[Any]]]:
    SEEN.seed(0)
    TAKEN.seed(0)
    return [([SEEN.sample() for _ in range(n + 1)], [TAKEN.sample() for _ in range(n)]) for n in (5, 3)]


def test_what_has_parts_is_read_as_rows_with_parts(tmp_path: Path) -> None:
    episodes = rooms()
    found = read_minari(in_groups(tmp_path / "x.hdf5", episodes))
    assert len(found["observation"]) == len(found["action"]) == 8
    known = {
        "observation": [x for seen, taken in episodes for x in seen[: len(taken)]],
        "action": [x for _, taken in episodes for x in taken],
        "episode": [0] * 5 + [1] * 3,
    }
    one, other = transitions(found, SEEN, TAKEN), transitions(known, SEEN, TAKEN)
    np.testing.assert_array_equal(one.observation, other.observation)
    np.testing.assert_array_equal(one.action, other.action)
    np.testing.assert_array_equal(one.episode, other.episode)


def test_it_is_cloned(tmp_path: Path) -> None:
    place = in_groups(tmp_path / "x.hdf5", rooms())
    run = pg.clone(Rooms, str(place), iterations=2, validation=0, progress=False)
    assert TAKEN.contains(run.act(SEEN.sample()))


PARTS: list[tuple[Any, str]] = [
    (lambda file: file["episode_0"].create_dataset("observations/more", data=np.zeros(4)), "differ in length"),
    (lambda file: file["episode_0"].create_dataset("observations/text", data=np.array([b"a"] * 6)), "no numbers"),
    (lambda file: file["episode_0"].create_dataset("actions/one", data=1.0), "no numbers"),
    (lambda file: file["episode_0/observations"].create_group("none"), "has no observations"),
]


@pytest.mark.parametrize(("change", "said"), PARTS)
def test_parts_that_make_no_sense_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    path = in_groups(tmp_path / "x.hdf5", rooms())
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(UserError, match=said) as raised:
        read_minari(path)
    assert len(str(raised.value)) <= 200


def test_episodes_with_parts_and_without_are_refused(tmp_path: Path) -> None:
    path = in_groups(tmp_path / "x.hdf5", rooms())
    with h5py.File(path, "a") as file:
        del file["episode_1/actions"]
        file["episode_1"].create_dataset("actions", data=np.zeros(3))
    with pytest.raises(UserError, match=r"action has parts .* in some of its episodes alone"):
        read_minari(path)


def test_a_file_that_is_missing_or_is_no_hdf5_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_minari(tmp_path)
    (tmp_path / "x.hdf5").write_text("nothing")
    with pytest.raises(UserError, match=r"x\.hdf5 cannot be read"):
        read_minari(tmp_path / "x.hdf5")
    with pytest.raises(UserError, match="has no episodes"):
        read_minari(written(tmp_path / "empty.hdf5", []))
