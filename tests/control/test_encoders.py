"""Encoders: images are cast, scaled and laid out as their space says; the networks of the papers; own modules."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import conv2d, linear, relu

import policygrad as pg
from policygrad import compiling
from policygrad.control import Critic, Policy
from policygrad.control.encoders import (
    NETWORKS,
    chosen,
    has_network,
    impala,
    least_side,
    make_encoder,
    measured,
    nature,
    small,
)
from policygrad.control.spaces import Flat
from policygrad.errors import UserError
from policygrad.precision import computed_in, without_autocast


def image(*shape: int, high: int = 255) -> spaces.Box:
    return spaces.Box(0, high, shape, np.uint8)


class Seen(nn.Module):
    """Keeps what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return x.flatten(1)


def test_an_image_arrives_between_0_and_1_with_its_channels_first() -> None:
    first, last = (make_encoder(image(*shape), Seen()) for shape in ((2, 4, 5), (4, 5, 2)))
    obs = torch.randint(256, (3, 1, 2, 4, 5), dtype=torch.uint8)
    features = first(obs)
    assert torch.equal(last(obs.movedim(2, -1)), features)
    assert features.shape == (3, 1, 40)
    assert torch.equal(first.network.x, last.network.x)
    assert torch.equal(first.network.x, obs[:, 0].float() / 255)


def test_the_scale_is_that_of_the_spaces_bounds() -> None:
    encoder = make_encoder(spaces.Box(10, 20, (1, 3, 3), np.uint8), Seen())
    encoder(torch.tensor([10, 15, 20], dtype=torch.uint8).expand(1, 1, 1, 3, 3))
    assert encoder.network.x[0, 0, 0].tolist() == [0.0, 0.5, 1.0]
    constant = make_encoder(spaces.Box(7, 7, (1, 3, 3), np.uint8), Seen())
    assert constant(torch.full((1, 1, 1, 3, 3), 7, dtype=torch.uint8)).tolist() == [[[0.0] * 9]]


@pytest.mark.parametrize(
    ("shape", "encoder", "channels", "expected"),
    [
        ((4, 84, 84), "auto", "auto", ("nature", "first")),
        ((210, 160, 3), "auto", "auto", ("nature", "last")),
        ((36, 36, 1), "auto", "auto", ("nature", "last")),
        ((35, 84, 1), "auto", "auto", ("small", "last")),
        ((7, 7, 3), "auto", "auto", ("small", "last")),
        ((3, 3, 3), "auto", "first", ("small", "first")),
        ((1, 2, 3), "auto", "auto", ("flat", "auto")),
        ((3, 3, 3), "flat", "auto", ("flat", "auto")),
        ((4, 84, 84), "impala", "last", ("impala", "last")),
    ],
)
def test_auto_goes_by_the_shape(shape: Any, encoder: str, channels: str, expected: Any) -> None:
    assert chosen(image(*shape), encoder, channels) == expected


@pytest.mark.parametrize(
    ("space", "encoder", "channels", "said"),
    [
        (image(3, 8, 3), "auto", "auto", r"channels may be the first or the last dimension of images \[3, 8, 3\]"),
        (image(1, 35, 84), "nature", "auto", "encoder nature needs images of at least 36 x 36, and these are 35 x 84"),
        (image(1, 2, 9), "small", "auto", "encoder small needs images of at least 3 x 3, and these are 2 x 9: use imp"),
        (image(1, 10, 10), "auto", "last", "encoder small needs images of at least 3 x 3, and these are 1 x 10"),
        (image(1, 10, 10), "flat", "first", "encoder flat reads none"),
        (image(1, 10, 10), "resnet", "auto", "encoder is resnet: choose auto, flat, nature, impala, small"),
        (image(84, 84), "nature", "auto", "encoder nature is for images, a Box of uint8 of three dimensions"),
        (spaces.Box(0, 1, (3, 84, 84), np.float32), "nature", "auto", "encoder nature is for images"),
        (spaces.Box(0, 1, (3, 84, 84), np.float32), "auto", "first", "channels first is for images"),
        (spaces.Discrete(3), "small", "auto", "encoder small is for images"),
        (image(2, 9, 9), nn.Conv2d(2, 2, 3), "auto", r"\[2, 2, 7, 7\] for \[2, 2, 9, 9\]: return features"),
        (image(2, 9, 9), nn.Linear(3, 2), "auto", "the encoder raised RuntimeError for"),
        (image(2, 9, 9), nn.LSTM(9, 2), "auto", "the encoder"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [Critic, lambda space, **how: Policy(space, spaces.Discrete(2), **how)])
def test_what_does_not_fit_is_one_line(make: Any, space: spaces.Space, encoder: Any, channels: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make(space, encoder=encoder, channels=channels)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize(
    ("obs", "said"),
    [
        (torch.zeros(1, 1, 1, 10, 10), "takes images of uint8, and got float32"),
        (torch.zeros(1, 1, 2, 10, 10, dtype=torch.uint8), r"takes images \[1, 10, 10\], and got \[2, 10, 10\]"),
    ],
)
def test_other_images_than_the_spaces_are_refused(obs: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Policy(image(1, 10, 10), spaces.Discrete(2))(obs)


# The networks, written out a second time


def written_out(network: nn.Sequential, x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    weights = list(network.parameters())
    for k, stride in enumerate(strides):
        x = relu(conv2d(x, weights[2 * k], weights[2 * k + 1], stride))
    return relu(linear(x.reshape(len(x), -1), *weights[-2:]))


def test_nature_and_small_are_those_of_their_papers() -> None:
    x = torch.rand(2, 4, 84, 84)
    network = nature((4, 84, 84))
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7)]
    assert [tuple(p.shape) for p in network.parameters() if p.ndim > 1] == shapes
    torch.testing.assert_close(network(x), written_out(network, x, (4, 2, 1)))
    network, x = small((3, 10, 10)), torch.rand(2, 3, 10, 10)
    assert [tuple(p.shape) for p in network.parameters() if p.ndim > 1] == [(16, 3, 3, 3), (128, 16 * 8 * 8)]
    torch.testing.assert_close(network(x), written_out(network, x, (1,)))


def test_impala_is_three_stages_of_residuals_at_half_the_size_each() -> None:
    network = impala((3, 64, 64))
    assert [tuple(p.shape) for p in network.parameters() if p.ndim == 2] == [(256, 32 * 8 * 8)]
    assert sum(p.ndim == 4 for p in network.parameters()) == 15
    x, weights = torch.rand(2, 3, 64, 64), iter(network.parameters())

    def convolved(x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, next(weights), next(weights), padding=1)

    y = x
    for _ in range(3):
        y = nn.functional.max_pool2d(convolved(y), 3, 2, 1)
        for _ in range(2):
            y = y + convolved(relu(convolved(relu(y))))
    torch.testing.assert_close(network(x), relu(linear(relu(y).flatten(1), *weights)))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sides", [(36, 36), (37, 50), (84, 84), (210, 160)])
def test_every_size_from_the_smallest_on_is_taken_and_measured(name: str, sides: Any) -> None:
    encoder = make_encoder(image(2, *sides), name)
    assert encoder(torch.zeros(1, 2, 2, *sides, dtype=torch.uint8)).shape == (1, 2, encoder.size)
    space = spaces.Box(0, 255, (2, *sides), np.uint8)
    assert measured(space, name, "first") == (sum(p.numel() for p in encoder.parameters()), encoder.size)


def test_the_least_side_is_what_leaves_one_pixel() -> None:
    assert least_side(((1, 8, 4), (1, 4, 2), (1, 3, 1))) == 36
    assert nature((1, 36, 36))[-2].in_features == 64
    with pytest.raises(UserError):
        nature((1, 35, 36))


def test_weights_are_orthogonal_of_gain_sqrt_2_where_they_are_asked_for() -> None:
    for name in ("nature", "small"):
        for layer in make_encoder(image(4, 36, 36), name).network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                rows = layer.weight.flatten(1)
                rows = rows if rows.shape[0] <= rows.shape[1] else rows.t()
                torch.testing.assert_close(rows @ rows.t(), 2 * torch.eye(len(rows)), rtol=0, atol=1e-4)
                assert not layer.bias.any()
    plain = make_encoder(image(4, 36, 36), "nature", orthogonal=False).network
    assert plain[0].bias.any()


def test_features_of_residuals_keep_their_size() -> None:
    torch.manual_seed(0)
    assert make_encoder(image(3, 64, 64), "impala")(torch.randint(256, (1, 8, 3, 64, 64), dtype=torch.uint8)).std() < 1


# In policies and critics


@pytest.mark.parametrize("encoder", ["flat", "impala", "small"])
def test_gradients_of_many_images_at_once_are_those_of_each(encoder: str, float64: None) -> None:
    """As the optimal baseline takes them, by torch.vmap."""
    policy = Policy(image(6, 7, 3), spaces.Discrete(3), encoder=encoder, hidden=())
    obs, parameters = torch.randint(256, (4, 1, 6, 7, 3), dtype=torch.uint8), dict(policy.named_parameters())

    def of_one(parameters: dict[str, Tensor], obs: Tensor) -> Tensor:
        return functional_call(policy, parameters, obs.unsqueeze(0)).logits.square().sum()

    found = vmap(grad(of_one), (None, 0))(parameters, obs)
    for i in range(4):
        for name, x in grad(of_one)(parameters, obs[i]).items():
            torch.testing.assert_close(found[name][i], x)


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("encoder", ["flat", "impala", "small"])
def test_a_policy_is_rebuilt_from_its_description(encoder: str, channels: str) -> None:
    how = {} if encoder == "flat" else {"channels": channels}
    policy = Policy(image(6, 7, 8, high=9), spaces.Discrete(3), encoder=encoder, hidden=(), **how)
    assert policy.description is not None
    again = Policy.from_description(policy.description)
    again.load_state_dict(policy.state_dict())
    obs = torch.randint(10, (2, 3, 6, 7, 8), dtype=torch.uint8)
    assert torch.equal(policy(obs).logits, again(obs).logits)  # type: ignore[attr-defined]
    assert again.description == policy.description


@pytest.mark.parametrize("encoder", NETWORKS)
def test_under_autocast_a_network_computes_what_its_copy_in_bfloat16_does(encoder: str) -> None:
    space, obs = image(3, 36, 36), torch.randint(256, (2, 5, 3, 36, 36), dtype=torch.uint8)
    encode = make_encoder(space, encoder, autocast=torch.bfloat16)
    copy = deepcopy(encode.network).bfloat16()
    features, expected = encode(obs), copy(encode.prepared(obs.flatten(0, 1)).bfloat16())
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected.float().reshape(2, 5, -1), rtol=0, atol=0)
    with without_autocast(encode):
        plain = encode(obs)
    assert 0 < (features - plain).norm() / plain.norm() < 2**-6  # of 8 significant bits, some are lost on the way
    seen = []
    for x in (features, plain):
        encode.zero_grad()
        x.square().sum().backward()
        assert all(p.grad.dtype == p.dtype == torch.float32 for p in encode.parameters())
        seen.append(torch.cat([p.grad.flatten() for p in encode.parameters()]))
    assert 0 < (seen[0] - seen[1]).norm() / seen[1].norm() < 2**-4
    assert encode.autocast == torch.bfloat16


def test_autocast_is_kept_with_the_policy_and_reaches_images_among_other_parts() -> None:
    parts = Flat(spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": image(3, 7, 7)}))
    for space in (image(3, 7, 7), parts):
        policy = Policy(space, spaces.Discrete(3), autocast=torch.bfloat16)
        again = Policy.from_description(policy.description)  # type: ignore[arg-type]
        assert computed_in(policy) == computed_in(again) == {torch.float32, torch.bfloat16}
        assert policy.description["autocast"] == again.description["autocast"] == "bfloat16"  # type: ignore[index]
        assert has_network(policy)
        assert computed_in(Policy(space, spaces.Discrete(3))) == {torch.float32}
    assert not has_network(Policy(image(3, 7, 7), spaces.Discrete(3), encoder="flat"))


@pytest.mark.parametrize("autocast", [torch.float16, torch.float64])
def test_another_type_of_arithmetic_is_refused(autocast: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"^autocast is .*: choose torch.bfloat16, or None$"):
        Policy(image(3, 7, 7), spaces.Discrete(3), autocast=autocast)


def test_a_module_that_means_something_else_by_autocast_keeps_it() -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(147, 2))
    own.autocast = "mine"
    policy = Policy(image(3, 7, 7), spaces.Discrete(3), encoder=own, autocast=torch.bfloat16)
    assert computed_in(policy) == {torch.float32, torch.bfloat16}
    with without_autocast(policy):
        assert own.autocast == "mine"
        assert computed_in(policy) == {torch.float32}
    assert policy.encode.autocast == torch.bfloat16


@pytest.mark.parametrize("method", ["reinforce", "a2c", "ppo", "trpo", "npg"])
def test_a_run_in_bfloat16_trains_and_is_loaded_as_it_was(method: str, tmp_path: Path) -> None:
    how: Any = {"iterations": 2, "num_envs": 4, "autocast": "bfloat16", "out": tmp_path / "run", "preset": "none"}
    run = pg.train(method, "policygrad/Catch-v0", **how)
    loaded = pg.load(tmp_path / "run")
    assert run.critic is not None
    for network in (run.policy, run.critic, loaded.policy):
        assert computed_in(network) == {torch.float32, torch.bfloat16}
    obs = torch.randint(256, (3, 2, *run.world.observation_space.shape), dtype=torch.uint8)  # type: ignore[attr-defined]
    assert torch.equal(run.policy(obs).logits, loaded.policy(obs).logits)
    other = pg.train(method, "policygrad/Catch-v0", **how | {"autocast": "none", "out": tmp_path / "other"})
    assert not torch.equal(run.policy(obs).logits, other.policy(obs).logits)


def test_a_run_in_float32_goes_on_in_bfloat16(tmp_path: Path) -> None:
    how: Any = {"iterations": 1, "num_envs": 4, "preset": "none"}
    pg.train("ppo", "policygrad/Catch-v0", **how, out=tmp_path / "run")
    goes_on = {"start": tmp_path / "run", "autocast": "bfloat16", "out": tmp_path / "next"}
    assert computed_in(pg.train("ppo", "policygrad/Catch-v0", **how, **goes_on).policy) == {
        torch.float32,
        torch.bfloat16,
    }


@pytest.mark.parametrize("autocast", ["bfloat16", "auto"])
@pytest.mark.parametrize(("task", "how"), [("CartPole-v1", {}), ("policygrad/Catch-v0", {"encoder": "flat"})])
def test_autocast_that_no_network_reads_is_refused(autocast: Any, task: str, how: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^autocast is of the encoder of images, and these observations have none"):
        pg.train("ppo", task, autocast=autocast, iterations=1, out=tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


def test_what_auto_chose_is_in_the_description() -> None:
    description: Any = Policy(image(84, 84, 4), spaces.Discrete(3)).description
    assert (description["encoder"], description["channels"]) == ("nature", "last")
    description = Policy(spaces.Discrete(4), spaces.Discrete(3)).description
    assert (description["encoder"], description["channels"]) == ("flat", "auto")


def test_a_module_of_ones_own_is_the_encoder_of_policy_and_critic() -> None:
    images, vectors = image(5, 5, 2), spaces.Box(-1, 1, (3,), np.float64)
    net = nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten(), nn.LazyLinear(6))
    policy, critic = Policy(images, spaces.Discrete(2), encoder=net), Critic(images, encoder=net, hidden=())
    obs = torch.randint(256, (4, 2, 5, 5, 2), dtype=torch.uint8)
    assert policy(obs).batch_shape == critic(obs).shape == (4, 2)
    assert policy.encode.size == critic.encode.size == 6
    assert policy.description is None
    features = Policy(vectors, spaces.Discrete(2), encoder=nn.Linear(3, 4)).encode(torch.ones(4, 2, 3))
    assert features.shape == (4, 2, 4)
    table = Critic(spaces.Discrete(5), encoder=nn.Embedding(5, 4))
    assert table(torch.zeros(4, 2, dtype=torch.long)).shape == (4, 2)


def test_a_run_with_an_encoder_of_ones_own_is_handed_in_again(tmp_path: Path) -> None:
    def policy(*both: spaces.Space) -> Policy:
        return Policy(*both, encoder=nn.Sequential(nn.Flatten(), nn.Linear(100, 8)))

    options = {"iterations": 1, "num_envs": 2, "num_steps": 16, "minibatch_size": 16, "preset": "none"}
    run = pg.train("ppo", "policygrad/Catch-v0", policy=policy, out=tmp_path, progress=False, **options)
    with pytest.raises(UserError, match="of your own"):
        pg.load(tmp_path)
    obs = np.zeros((3, 1, 10, 10), np.uint8)
    assert (pg.load(tmp_path, policy=policy).act(obs) == run.act(obs)).all()


def test_rollouts_keep_the_bytes() -> None:
    environments = pg.make_environments("policygrad/Catch-v0", 3)
    sample = pg.Sampler(environments, 12, seed=0)
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    rollout = sample(policy)
    assert rollout.obs.dtype == rollout.final_obs.dtype == torch.uint8
    assert rollout.obs.shape == (3, 12, 1, 10, 10)
    again = policy(rollout.obs).log_prob(rollout.action)
    torch.testing.assert_close(again[rollout.mask], rollout.logp[rollout.mask])


def test_normalized_images_are_refused() -> None:
    environments = pg.make_environments("policygrad/Catch-v0", 3)
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    normalizer = pg.ObservationNormalizer((1, 10, 10))
    with pytest.raises(UserError, match="not normalized"):
        pg.Sampler(environments, 12, seed=0, observation_normalizer=normalizer)(policy)
    with pytest.raises(UserError, match="leave normalize_observations out"):
        pg.train("ppo", "policygrad/Catch-v0", normalize_observations=True, progress=False)


def test_a_policy_plays_the_images_that_it_was_trained_on() -> None:
    policy = Policy(image(1, 10, 10), spaces.Discrete(3))
    assert pg.evaluate(policy, "policygrad/Catch-v0", 3).episodes == 3
    for other in (image(1, 12, 12), image(2, 10, 10), image(1, 10, 10, high=1)):
        with pytest.raises(UserError, match=r"the policy's is Box.*: use the environment of its training") as raised:
            pg.evaluate(Policy(other, spaces.Discrete(3)), "policygrad/Catch-v0", 3)
        assert len(str(raised.value)) <= 200

    def of_floats() -> gymnasium.Env:
        return gymnasium.wrappers.DtypeObservation(gymnasium.make("policygrad/Catch-v0"), np.float32)

    with pytest.raises(UserError, match=r"the policy's is Box\(0, 255, \(1, 10, 10\), uint8\)"):
        pg.evaluate(policy, of_floats, 3)


# Compiled


def compare_compiled() -> None:
    """Steps as one graph on images are the plain ones. Run where shapes are not checked."""
    compiling.BACKEND = "eager"  # the graph, without the minute in which code is made of convolutions
    torch.manual_seed(0)
    for autocast in (None, torch.bfloat16):
        how: Any = {"encoder": "small", "autocast": autocast}
        policy = Policy(image(2, 36, 36), spaces.Discrete(3), hidden=(), **how)
        objectives = [pg.PPOObjective(x, Critic(image(2, 36, 36), **how)) for x in (policy, deepcopy(policy))]
        objectives[1].critic.load_state_dict(objectives[0].critic.state_dict())
        obs = torch.randint(256, (16, 1, 2, 36, 36), dtype=torch.uint8)
        with torch.no_grad():
            action = policy(obs).sample()
            logp = policy(obs).log_prob(action)
        mask, advantage = torch.ones(16, 1, dtype=torch.bool), torch.randn(16, 1)
        batch = pg.rollout.Batch(obs, action, logp, mask, mask / 16, advantage, advantage, 0 * advantage)
        found = []
        for objective, compiled in zip(objectives, (False, True), strict=True):
            optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
            update = pg.updates.ascend(optimizer, max_grad_norm=0.5, compiled=compiled)
            found.append([update(objective, batch) for _ in range(3)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
        for a, b in zip(*(x.parameters() for x in objectives), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-4)


def test_compiled_steps_on_images_are_the_plain_ones() -> None:
    command = "import warnings; from policygrad.errors import Note; warnings.simplefilter('error', Note)\n"
    command += "from tests.control.test_encoders import compare_compiled; compare_compiled()"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
