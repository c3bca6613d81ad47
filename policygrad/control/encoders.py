"""Encoders: obs [B, T, ...] -> features [B, T, size]. Vectors, state numbers, images, and networks of one's own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.functional import one_hot, relu

from policygrad.errors import UserError, one_line, type_of


class Flatten(nn.Module):
    """A Box of any rank as one vector of floats."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.size = math.prod(shape)

    def forward(self, obs: Tensor) -> Tensor:
        features = obs.reshape(*obs.shape[:2], self.size)
        return features if features.is_floating_point() else features.to(torch.get_default_dtype())


class OneHot(nn.Module):
    """A state number as a vector with a single 1."""

    def __init__(self, n: int, start: int) -> None:
        super().__init__()
        self.size, self.start = n, start

    def forward(self, obs: Tensor) -> Tensor:
        return one_hot(obs.long() - self.start, self.size).to(torch.get_default_dtype())


class Each(nn.Module):
    """Every observation by itself through a network from batches [N, ...] to features [N, size].

    A Box arrives as floats, a state number as it is. Raises UserError if the network returns no features.
    """

    def __init__(self, network: nn.Module, space: spaces.Space) -> None:
        super().__init__()
        self.network = network
        self.size = _feature_count(network, self.prepared(torch.from_numpy(np.stack([_least(space)] * 2))))

    def forward(self, obs: Tensor) -> Tensor:
        features = self.network(self.prepared(obs.flatten(0, 1)))
        return features.reshape(*obs.shape[:2], self.size)

    def prepared(self, obs: Tensor) -> Tensor:
        """Observations [N, ...] as the network takes them."""
        return obs.to(torch.get_default_dtype()) if obs.ndim > 1 else obs


class Images(Each):
    """Every image by itself through a network: cast, scaled from the space's bounds to [0, 1], [N, C, H, W].

    space: a Box of uint8 and three dimensions. channels: "first" or "last", where they stand in it.
    """

    def __init__(self, network: nn.Module, space: spaces.Box, channels: str) -> None:
        self.low, self.span = float(space.low.min()), float(max(1, int(space.high.max()) - int(space.low.min())))
        self.shape, self.channels = space.shape, channels
        super().__init__(network, space)

    def prepared(self, obs: Tensor) -> Tensor:
        if obs.dtype != torch.uint8:
            raise UserError(
                f"the encoder takes images of uint8, and got {str(obs.dtype).removeprefix('torch.')}: give them as "
                "they are, not normalized (the encoder scales them)"
            )
        if obs.shape[1:] != self.shape:
            raise UserError(f"the encoder takes images {list(self.shape)}, and got {list(obs.shape[1:])}: fix the two")
        images = obs if self.channels == "first" else obs.movedim(-1, 1)
        floats = images.to(torch.get_default_dtype(), memory_format=torch.channels_last)  # convolutions are faster so
        return (floats - self.low) / self.span if self.low else floats / self.span


# Networks for images: floats [N, C, H, W] -> features [N, size]. Each takes the shape [C, H, W].


NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride of each convolution
SMALL = ((16, 3, 1),)


def nature(shape: Sequence[int]) -> nn.Sequential:
    """Three convolutions and a linear layer of 512 (Mnih et al. 2015), for images of about 84 x 84, from 36 x 36 on."""
    return _convolutions("nature", shape, NATURE, 512)


def small(shape: Sequence[int]) -> nn.Sequential:
    """A convolution and a linear layer of 128 (Young & Tian 2019, arXiv 1903.03176), for images from 3 x 3 on."""
    return _convolutions("small", shape, SMALL, 128)


def impala(shape: Sequence[int]) -> nn.Sequential:
    """Three stages of two residual blocks, and a linear layer of 256 (Espeholt et al. 2018, arXiv 1802.01561)."""
    channels, *sides = shape
    layers: list[nn.Module] = []
    for outputs in (16, 32, 32):
        pooled = [nn.Conv2d(channels, outputs, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
        layers += [*pooled, Residual(outputs), Residual(outputs)]
        channels, sides = outputs, [-(-side // 2) for side in sides]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(channels * math.prod(sides), 256), nn.ReLU())


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(relu(self.first(relu(x))))


NETWORKS: dict[str, Callable[[Sequence[int]], nn.Sequential]] = {"nature": nature, "impala": impala, "small": small}


def _convolutions(
    name: str, shape: Sequence[int], convolutions: Sequence[tuple[int, int, int]], size: int
) -> nn.Sequential:
    """Convolutions with ReLU after each, flattened, and a linear layer with ReLU."""
    channels, *sides = shape
    if min(sides) < (least := least_side(convolutions)):
        others = " or ".join(x for x, other in (("small", SMALL), ("impala", ())) if min(sides) >= least_side(other))
        raise UserError(
            f"encoder {name} needs images of at least {least} x {least}, and these are {sides[0]} x {sides[1]}: "
            f"use {others}"
        )
    layers: list[nn.Module] = []
    for outputs, kernel, stride in convolutions:
        layers += [nn.Conv2d(channels, outputs, kernel, stride), nn.ReLU()]
        channels, sides = outputs, [(side - kernel) // stride + 1 for side in sides]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * math.prod(sides), size), nn.ReLU())


def least_side(convolutions: Sequence[tuple[int, int, int]]) -> int:
    """The smallest image side of which one pixel is left."""
    side = 1
    for _, kernel, stride in reversed(convolutions):
        side = (side - 1) * stride + kernel
    return side


# From a space to its encoder


def is_image(space: spaces.Space) -> bool:
    """Whether observations in a space are images: uint8, of three dimensions."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def chosen(space: spaces.Space, encoder: str, channels: str) -> tuple[str, str]:
    """The encoder's name and the place of the channels ("auto" where none are read), with "auto" decided.

    Raises UserError where they do not fit the space, and where the space does not say where the channels are.
    """
    if not is_image(space):
        for option, value in (("encoder", encoder), ("channels", channels)):
            if value not in ("auto", "flat"):
                raise UserError(
                    f"{option} {value} is for images, a Box of uint8 of three dimensions, and observations are in "
                    f"{one_line(space, 60)}: leave it out, or wrap the environment"
                )
        return "flat", "auto"
    if encoder == "flat":
        if channels != "auto":
            raise UserError(f"channels is {channels}, and encoder flat reads none: leave channels out")
        return "flat", "auto"
    shape: Any = space.shape
    asked = channels != "auto"
    if channels == "auto":
        if shape[0] == shape[2]:
            raise UserError(
                f"channels may be the first or the last dimension of images {list(shape)}: say which, with channels "
                "first or last, or choose encoder flat"
            )
        channels = "first" if shape[0] < shape[2] else "last"
    if encoder == "auto":
        side = min(channels_first(shape, channels)[1:])
        fitting = [name for name, x in (("nature", NATURE), ("small", SMALL)) if side >= least_side(x)]
        if not fitting and not asked:
            return "flat", "auto"
        encoder = fitting[0] if fitting else "small"  # which says what it needs
    return encoder, channels


def channels_first(shape: Sequence[int], channels: str) -> tuple[int, int, int]:
    """The shape of an image as [C, H, W]."""
    return (shape[0], shape[1], shape[2]) if channels == "first" else (shape[2], shape[0], shape[1])


def measured(shape: Sequence[int], encoder: str, channels: str) -> tuple[int, int]:
    """The parameters of a network for images of this shape, and its features, before memory is taken for it."""
    with torch.device("meta"):
        network = NETWORKS[encoder](channels_first(shape, channels))
    return sum(p.numel() for p in network.parameters()), network[-2].out_features  # type: ignore[return-value]


def make_encoder(
    space: spaces.Space, encoder: str | nn.Module = "auto", channels: str = "auto", orthogonal: bool = True
) -> Any:
    """The encoder of an observation space, which has a `size`.

    encoder: `flat` (vectors, one-hot state numbers, the pixels of images), `nature`, `impala`, `small`, `auto` (images
    from 36 x 36 on: nature, from 3 x 3 on: small), or a module from observations [N, ...], of images floats
    [N, C, H, W] in [0, 1], to features [N, size]. channels: `first`, `last`, or `auto`: the smaller one of the two.
    orthogonal: orthogonal initial weights of gain sqrt(2); impala keeps torch's own, so that its sums do not grow.

    Raises UserError for a space that is neither a Box nor Discrete, and for what does not fit the space.
    """
    if not isinstance(space, spaces.Box | spaces.Discrete):
        raise UserError(
            f"there is no encoder for the observation space {one_line(space, 60)}: make the environment with "
            "make_environments, which flattens it, or use a policy of your own"
        )
    if isinstance(encoder, nn.Module):
        _, channels = chosen(space, "nature" if is_image(space) else "auto", channels)
        return Images(encoder, space, channels) if is_image(space) else Each(encoder, space)  # type: ignore[arg-type]
    if encoder not in ("auto", "flat", *NETWORKS):
        raise UserError(f"encoder is {one_line(encoder, 40)}: choose auto, flat, {', '.join(NETWORKS)}, or a module")
    encoder, channels = chosen(space, encoder, channels)
    if isinstance(space, spaces.Discrete):
        return OneHot(int(space.n), int(space.start))
    if not is_image(space):
        return Flatten(space.shape)
    if encoder == "flat":
        return Images(nn.Flatten(), space, "first")
    network = NETWORKS[encoder](channels_first(space.shape, channels))
    for layer in network if orthogonal else ():
        if isinstance(layer, nn.Conv2d | nn.Linear) and encoder != "impala":
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return Images(network, space, channels)


def _least(space: Any) -> np.ndarray:
    """An observation of a space, to try a network with."""
    return np.asarray(space.start if isinstance(space, spaces.Discrete) else np.zeros(space.shape, space.dtype))


@torch.no_grad()
def _feature_count(network: nn.Module, batch: Tensor) -> int:
    """The number of features that a network makes of each of two observations. Raises UserError if it makes none."""
    training = network.training
    try:
        features = network.eval()(batch)
    except Exception as error:
        said = f"the encoder raised {type(error).__name__} for {list(batch.shape)} of {batch.dtype}: "
        raise UserError(said + one_line(error, 197 - len(said))) from error
    finally:
        network.train(training)
    if not isinstance(features, Tensor):
        raise UserError(f"the encoder returned {type_of(features)}: return a tensor of features [N, size]")
    if features.ndim != 2 or len(features) != 2 or not features.is_floating_point():
        raise UserError(
            f"the encoder returned {features.dtype} {list(features.shape)} for {list(batch.shape)}: return features "
            "[N, size]"
        )
    return features.shape[1]
