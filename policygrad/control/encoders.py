"""Encoders: obs [B, T, ...] -> features [B, T, size]. Vectors, state numbers, images, and networks of one's own."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.functional import one_hot, relu

from policygrad.control.memory import is_mapped
from policygrad.control.spaces import MASK, Flat, is_image
from policygrad.errors import UserError, listed, one_line, type_of
from policygrad.precision import precision


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

    A Box arrives as floats, a state number as it is. autocast: the type of the network's arithmetic (bfloat16); its
    weights and the features keep theirs. Raises UserError if the network returns no features.
    """

    def __init__(self, network: nn.Module, space: spaces.Space, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self.network, self.mask = network, space.mask if isinstance(space, Flat) else None
        self.size = _feature_count(network, self.prepared(torch.from_numpy(np.stack([_least(space)] * 2))))

    def forward(self, obs: Tensor) -> Tensor:
        prepared = self.prepared(obs.flatten(0, 1))
        with precision(obs.device, self.autocast):
            features = self.network(prepared)
        if self.autocast is not None:
            features = features.to(torch.get_default_dtype())
        return features.reshape(*obs.shape[:2], self.size)

    def prepared(self, obs: Tensor) -> Tensor:
        """Observations [N, ...] as the network takes them, without a mask of actions."""
        if self.mask is not None:
            obs = torch.cat([obs[:, : self.mask.start], obs[:, self.mask.stop :]], 1)
        return obs.to(torch.get_default_dtype()) if obs.ndim > 1 else obs


class Images(Each):
    """Every image by itself through a network: cast, scaled from the space's bounds to [0, 1], [N, C, H, W].

    space: a Box of uint8 and three dimensions. channels: "first" or "last", where they stand in it.
    """

    def __init__(
        self, network: nn.Module, space: spaces.Box, channels: str, autocast: torch.dtype | None = None
    ) -> None:
        self.low, self.span = float(space.low.min()), float(max(1, int(space.high.max()) - int(space.low.min())))
        self.shape, self.channels = space.shape, channels
        super().__init__(network, space, autocast)

    def prepared(self, obs: Tensor) -> Tensor:
        if obs.dtype != torch.uint8:
            raise UserError(
                f"the encoder takes images of uint8, and got {str(obs.dtype).removeprefix('torch.')}: give them as "
                "they are, not normalized (the encoder scales them)"
            )
        if obs.shape[1:] != self.shape:
            raise UserError(f"the encoder takes images {list(self.shape)}, and got {list(obs.shape[1:])}: fix the two")
        images = obs if self.channels == "first" else obs.movedim(-1, 1)
        # Convolutions are faster with the channels last; torch.vmap, as for the optimal baseline, has no such tensors.
        layout = torch.preserve_format if is_mapped(images) else torch.channels_last
        floats = images.to(torch.get_default_dtype(), memory_format=layout)
        return (floats - self.low) / self.span if self.low else floats / self.span


class Joined(nn.Module):
    """Parts of a Dict or Tuple side by side: images each through an encoder of its own, the others as they are.

    Of one vector [..., N] as Flat says, or packed. keys: of the parts that are seen; without them, all but an action
    mask.
    """

    def __init__(
        self,
        space: Flat,
        encoder: str,
        channels: str,
        orthogonal: bool,
        keys: Sequence[str],
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vectors, images = seen(space, keys)
        self.others = [space.place(x) for x in self.vectors]
        self.places = [space.place(place) for _, place in images]
        self.shapes = [part.shape for part, _ in images]
        made = [make_encoder(part, encoder, channels, orthogonal, autocast=autocast) for part, _ in images]
        self.images = nn.ModuleList(made)
        self.whole = self.vectors == [slice(0, space.shape[0])]
        widths = [x.stop - x.start for x in self.vectors]
        self.size: int = sum(widths) + sum(x.size for x in self.images)  # type: ignore[misc]

    def forward(self, obs: Tensor) -> Tensor:
        parts = [obs] if self.whole else [place.of(obs) for place in self.others]
        features = [x if x.is_floating_point() else x.to(torch.get_default_dtype()) for x in parts]
        for encode, place, shape in zip(self.images, self.places, self.shapes, strict=True):
            features.append(encode(place.of(obs).reshape(*obs.shape[:2], *shape).to(torch.uint8)))
        return features[0] if len(features) == 1 else torch.cat(features, -1)


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


def chosen(space: spaces.Space, encoder: str, channels: str) -> tuple[str, str]:
    """The encoder's name and the place of the channels ("auto" where none are read), with "auto" decided.

    Raises UserError where they do not fit the space, and where the space does not say where the channels are.
    """
    if isinstance(space, Flat) and (images := [part for _, part, _ in space.leaves if is_image(part)]):
        for part in images:
            chosen(part, encoder, channels)
        return encoder, channels
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


def measured(space: Any, encoder: str, channels: str, keys: Sequence[str] = ()) -> tuple[int, int]:
    """The parameters of make_encoder's encoder, and its features, before memory is taken for it."""
    if isinstance(space, Flat):
        vectors, images = seen(space, keys)
        found = [measured(part, *chosen(part, encoder, channels)) for part, _ in images]
        found += [(0, x.stop - x.start) for x in vectors]
        return sum(weights for weights, _ in found), sum(features for _, features in found)
    if encoder not in NETWORKS or not is_image(space):
        return 0, int(space.n) if isinstance(space, spaces.Discrete) else math.prod(space.shape)
    with torch.device("meta"):
        network = NETWORKS[encoder](channels_first(space.shape, channels))
    return sum(p.numel() for p in network.parameters()), network[-2].out_features  # type: ignore[return-value]


def seen(space: Flat, keys: Sequence[str]) -> tuple[list[slice], list[tuple[Any, slice]]]:
    """Where the vectors of these parts are, and (space, place) of their images. Without keys: all parts but the mask.

    Raises UserError for a key that is none of the space's.
    """
    for name in keys:
        if name not in space.slices or (name == MASK and space.mask is not None):
            known = listed([x for x in space.slices if x != MASK or space.mask is None])
            raise UserError(
                f"keys names {one_line(name, 40)}, and the parts of observations are {known}: choose of these"
            )
    chosen_keys = keys or [name for name in space.slices if name != MASK or space.mask is None]
    leaves = [(part, place) for name, part, place in space.leaves if name in chosen_keys]
    vectors: list[slice] = []
    for place in [place for part, place in leaves if not is_image(part)]:
        if vectors and vectors[-1].stop == place.start:
            place = slice(vectors.pop().start, place.stop)
        vectors.append(place)
    return vectors, [(part, place) for part, place in leaves if is_image(part)]


def make_encoder(
    space: spaces.Space,
    encoder: str | nn.Module = "auto",
    channels: str = "auto",
    orthogonal: bool = True,
    keys: Sequence[str] = (),
    autocast: torch.dtype | None = None,
) -> Any:
    """The encoder of an observation space, which has a `size`.

    encoder: `flat` (vectors, one-hot state numbers, the pixels of images), `nature`, `impala`, `small`, `auto` (images
    from 36 x 36 on: nature, from 3 x 3 on: small), or a module from observations [N, ...], of images floats
    [N, C, H, W] in [0, 1], to features [N, size]. channels: `first`, `last`, or `auto`: the smaller one of the two.
    orthogonal: orthogonal initial weights of gain sqrt(2); impala keeps torch's own, so that its sums do not grow.
    keys: the parts of a Dict or Tuple (a Flat) that are seen; by default all, but no action mask. autocast: the type
    of the arithmetic of an encoder's network, where there is one (bfloat16); weights and features keep theirs.

    Raises UserError for a space that is neither a Box nor Discrete, for what does not fit the space, and for another
    type of arithmetic.
    """
    if not isinstance(space, spaces.Box | spaces.Discrete):
        raise UserError(
            f"there is no encoder for the observation space {one_line(space, 60)}: make the environment with "
            "make_environments, which flattens it, or use a policy of your own"
        )
    if keys and not isinstance(space, Flat):
        raise UserError(
            f"keys are of Dict or Tuple observations, and these are in {one_line(space, 60)}: leave them out"
        )
    if autocast not in (None, torch.bfloat16):
        raise UserError(f"autocast is {one_line(autocast, 40)}: choose torch.bfloat16, or None")
    if isinstance(encoder, nn.Module):
        if keys:
            raise UserError("keys and an encoder of your own are two ways to choose what is seen: leave one out")
        _, channels = chosen(space, "nature" if is_image(space) else "auto", channels)
        kind: Any = partial(Images, channels=channels) if is_image(space) else Each
        return kind(encoder, space, autocast=autocast)
    if encoder not in ("auto", "flat", *NETWORKS):
        raise UserError(f"encoder is {one_line(encoder, 40)}: choose auto, flat, {', '.join(NETWORKS)}, or a module")
    encoder, channels = chosen(space, encoder, channels)
    if isinstance(space, Flat):
        return Joined(space, encoder, channels, orthogonal, keys, autocast)
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
    return Images(network, space, channels, autocast)


def has_network(module: nn.Module) -> bool:
    """Whether a policy or critic has an encoder with weights, which is what autocast is for."""
    return any(isinstance(part, Each) and any(True for _ in part.parameters()) for part in module.modules())


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
