"""The embedded data set: small street scenes, drawn procedurally, so that everything can be tried without a download.

Colours say little about the class: light, tint and the colours of nearly everything change from scene to scene. Texture,
shape and position do, and a handful of labelled scenes shows too few of them; that is what the unlabelled scenes are for.

The order in which random numbers are drawn is part of the data set: another order gives other scenes for the same seed.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.config.train import SyntheticConfig
from cps_ray.datasets.images import encode_image
from cps_ray.datasets.prepare.assembly import DataSetPlan, write_shards
from cps_ray.datasets.prepare.items import Item, Source, build_item

DRAWING = 1
"""Version of the drawing: goes up whenever `draw_scene` draws something else for the same seed, so that folders drawn before
are refused."""

CLASSES = ("sky", "building", "road", "sidewalk", "tree", "car", "person")
PALETTE = ((70, 130, 180), (110, 110, 110), (128, 64, 128), (244, 35, 232), (107, 142, 35), (0, 0, 142), (220, 20, 60))
SKY, BUILDING, ROAD, SIDEWALK, TREE, CAR, PERSON = range(len(CLASSES))

GRAIN = np.array([[0, 0, 1], [2, 2, 2], [7, 2, 0], [3, 6, 2], [14, 16, 5], [0, 1, 3], [2, 3, 0]], np.float32)
"""(class, blob size) strength of the texture in grey levels, for blobs of 1, 2 and 6 px."""

Rng = np.random.Generator
Rgb = tuple[float, float, float]
Point = tuple[float, float, float]
"""(lateral, up, depth). Lateral and up are in camera heights: 1 is the height of the camera above the road. The lower edge of
the image is at depth 1."""

_FIXED_POINT_BITS = 4
"""Fractional bits of the coordinates that OpenCV draws with (its `shift`)."""
_SPLITS = ("train", "val", "test")
"""Names of the splits; a split's position here is part of the seed of its scenes."""


@dataclass(frozen=True)
class _Street:
    """The layout of one scene; lengths in camera heights unless in px."""

    horizon: float
    """Distance of the horizon from the upper edge, in px."""
    vanish: float
    """Distance of the vanishing point, where the street ends, from the left edge, in px."""
    half_road: float
    """Half the width of the road."""
    left: float
    """Width of the left sidewalk."""
    right: float
    """Width of the right sidewalk."""
    haze: float
    """Rate, per unit of depth, at which colours fade into that of the haze: exp(-haze * depth) of them is left."""


@dataclass
class _Canvas:
    """Image, mask and shade of one scene; what is drawn later covers what was drawn before in all three."""

    street: _Street
    fog: Rgb
    """Colour of the haze."""
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    mask: NDArray[np.uint8]
    """(H, W) positions in CLASSES."""
    shade: NDArray[np.float32]
    """(H, W) fraction of the light that falls on a pixel."""

    def scale(self, depth: float) -> float:
        """Returns the pixels per camera height at a depth."""
        return (len(self.mask) - self.street.horizon) / depth

    def pixel(self, point: Point) -> tuple[float, float]:
        """Projects a point in space onto the image: (x, y) in px."""
        lateral, up, depth = point
        scale = self.scale(depth)
        # The camera is at height 1, so points at that height lie on the horizon at any depth.
        return self.street.vanish + lateral * scale, self.street.horizon + (1 - up) * scale

    def _raster(self, shape: list[Point]) -> NDArray[np.int32]:
        """Returns the corners of a shape as OpenCV takes them: int32 (corners, 2), fixed point."""
        corners = np.array([self.pixel(point) for point in shape])
        return np.round(corners * (1 << _FIXED_POINT_BITS)).astype(np.int32)

    def _layers(self, label: int, color: Rgb, depth: float) -> tuple[tuple[NDArray[Any], Any], ...]:
        """Returns the three layers, each with the value to draw in it; a depth fades the colour into the haze."""
        haze = 1 - float(np.exp(-self.street.haze * depth))
        faded = [c + (f - c) * haze for c, f in zip(color, self.fog, strict=True)]
        return (self.image, faded), (self.mask, label), (self.shade, 1.0)

    def fill(self, label: int, color: Rgb, *shapes: list[Point]) -> None:
        """Draws polygons of one class; the first corner's depth sets the haze."""
        corners = [self._raster(shape) for shape in shapes]
        for layer, value in self._layers(label, color, shapes[0][0][2]):
            cv2.fillPoly(layer, corners, value, shift=_FIXED_POINT_BITS)

    def disc(self, label: int, color: Rgb, center: Point, radius: float) -> None:
        """Draws a ball of one class, radius in camera heights."""
        middle = np.round(np.array(self.pixel(center)) * (1 << _FIXED_POINT_BITS)).astype(int).tolist()
        radius_px = max(1, round(radius * self.scale(center[2]) * (1 << _FIXED_POINT_BITS)))  # fixed point too
        for layer, value in self._layers(label, color, center[2]):
            cv2.circle(layer, middle, radius_px, value, -1, shift=_FIXED_POINT_BITS)

    def darken(self, shape: list[Point], fraction: float) -> None:
        """Draws a shadow that takes this fraction of the light; its class is that of what it falls on."""
        cv2.fillPoly(self.shade, [self._raster(shape)], 1 - fraction, shift=_FIXED_POINT_BITS)


# ------------------------------------------------------------------------------------------------------------ colours


def _hsv(rng: Rng, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]) -> Rgb:
    """Draws a random colour from ranges of hue, in turns, and of saturation and value, in 0..1: (r, g, b) in 0..255."""
    h, s, v = rng.uniform(*hue) * 6, rng.uniform(*saturation), rng.uniform(*value)
    # HSV to RGB without cases: V - V S max(0, min(k, 4 - k, 1)), k = (n + H/60°) mod 6, n = 5, 3, 1 for red, green, blue.
    r, g, b = (255 * v * (1 - s * max(0.0, min(k, 4 - k, 1.0))) for k in ((n + h) % 6 for n in (5, 3, 1)))
    return r, g, b


def _scale_color(color: Rgb, factor: float) -> Rgb:
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def _leaf_color(rng: Rng) -> Rgb:
    """Draws the colour of leaves: mostly green, but autumn and blossom take the colours of bricks and sky."""
    kind = rng.choice(["green", "autumn", "pale"], p=[0.75, 0.2, 0.05])
    hue = {"green": (0.2, 0.4), "autumn": (0.02, 0.15), "pale": (0.5, 1.0)}[kind]
    return _hsv(rng, hue, (0.3, 0.75), (0.2, 0.7))


def _sky_colors(rng: Rng) -> tuple[Rgb, Rgb]:
    """Draws the colours of the sky at the upper edge and at the horizon."""
    kind = rng.choice(["blue", "grey", "evening", "night"], p=[0.5, 0.3, 0.15, 0.05])
    if kind == "blue":
        return _hsv(rng, (0.52, 0.64), (0.3, 0.8), (0.6, 1.0)), _hsv(rng, (0.5, 0.64), (0.0, 0.3), (0.8, 1.0))
    if kind == "grey":
        return _hsv(rng, (0.5, 0.7), (0.0, 0.15), (0.4, 0.9)), _hsv(rng, (0.5, 0.7), (0.0, 0.1), (0.5, 0.95))
    if kind == "evening":
        return _hsv(rng, (0.55, 0.9), (0.2, 0.6), (0.3, 0.7)), _hsv(rng, (0.0, 0.13), (0.3, 0.8), (0.7, 1.0))
    return _hsv(rng, (0.6, 0.75), (0.2, 0.7), (0.1, 0.3)), _hsv(rng, (0.55, 0.8), (0.1, 0.5), (0.2, 0.45))


# ------------------------------------------------------------------------------------------------------------- things


def _slab(left: float, right: float, low: float, high: float, depth: float, taper: float = 0.0) -> list[Point]:
    """Returns a rectangle that faces the camera; its upper edge is shorter by `taper` at either end."""
    return [(left, low, depth), (right, low, depth), (right - taper, high, depth), (left + taper, high, depth)]


def _wall(lateral: float, near: float, far: float, low: float, high: float) -> list[Point]:
    """Returns an upright rectangle along the street."""
    return [(lateral, low, near), (lateral, low, far), (lateral, high, far), (lateral, high, near)]


def _ground(left: float, right: float, near: float, far: float) -> list[Point]:
    """Returns a rectangle that lies on the ground."""
    return [(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)]


def _draw_building(rng: Rng, canvas: _Canvas, lateral: float, near: float, far: float) -> None:
    """Draws one house beside the street: the front that faces the camera, the wall along the street, windows in both."""
    high = rng.uniform(1.6, 5.5)
    color = _hsv(rng, (0.0, 0.17), (0.0, 0.55), (0.3, 0.95))
    glass = _hsv(rng, (0.5, 0.7), (0.0, 0.5), (0.1, 0.9)) if rng.random() < 0.7 else _scale_color(color, 0.5)
    outward = float(np.sign(lateral)) * rng.uniform(1.5, 4.0)
    columns, edges = int(rng.integers(2, 5)), np.linspace(0.3, high, int(rng.integers(3, 7)))
    rows = [(a + 0.25 * (b - a), a + 0.75 * (b - a)) for a, b in pairwise(edges)]
    gap, front = rng.uniform(0.15, 0.3), rng.uniform(0.6, 1.0)

    canvas.fill(BUILDING, _scale_color(color, front), _slab(lateral, lateral + outward, 0, high, near))
    spans = [(k + gap, k + 1 - gap) for k in range(columns)]
    across = [tuple(lateral + outward * s / columns for s in span) for span in spans]
    canvas.fill(BUILDING, _scale_color(glass, front), *(_slab(a, b, *row, near) for a, b in across for row in rows))
    canvas.fill(BUILDING, color, _wall(lateral, near, far, 0, high))
    along = [tuple(near + (far - near) * s / columns for s in span) for span in spans]
    canvas.fill(BUILDING, glass, *(_wall(lateral, a, b, *row) for a, b in along for row in rows))


def _draw_houses(rng: Rng, canvas: _Canvas) -> None:
    """Draws a row of houses on either side, far ones first; a side can be without houses, as along a park."""
    street = canvas.street
    for lateral in (-street.half_road - street.left, street.half_road + street.right):
        density = rng.choice([0.0, 0.6, 0.95], p=[0.15, 0.3, 0.55])
        edges = [0.6]  # before the lower edge of the image, at depth 1
        while edges[-1] < 9:
            edges.append(edges[-1] * rng.uniform(1.25, 1.9))
        for near, far in reversed(list(pairwise(edges))):
            if rng.random() < density:
                _draw_building(rng, canvas, lateral, near, far)


def _draw_skyline(rng: Rng, canvas: _Canvas) -> None:
    """Draws what closes the street far away: blocks and tree tops."""
    for _ in range(int(rng.integers(3, 10))):
        lateral, width, high = rng.uniform(-16, 16), rng.uniform(1.5, 5), rng.uniform(1.3, 5)
        if rng.random() < 0.6:
            color = _hsv(rng, (0.0, 1.0), (0.0, 0.3), (0.3, 0.9))
            canvas.fill(BUILDING, color, _slab(lateral, lateral + width, 0, high, 10))
        else:
            color = _leaf_color(rng)
            for step in np.linspace(0, width, 4):
                canvas.disc(TREE, color, (lateral + step, 0.9, 10.0), rng.uniform(0.6, 1.5))


def _draw_pavement(rng: Rng, canvas: _Canvas) -> None:
    """Draws the sidewalk with joints, the road with markings, and shadows on both."""
    street = canvas.street
    near, far = 0.8, 60.0  # from before the lower edge of the image, at depth 1
    stone = _hsv(rng, (0.0, 0.17), (0.0, 0.25), (0.45, 0.85))
    asphalt = _hsv(rng, (0.5, 0.7), (0.0, 0.15), (0.2, 0.5))
    canvas.fill(SIDEWALK, stone, _ground(-400, 400, near, far))
    joint, pitch = _scale_color(stone, rng.uniform(0.65, 0.9)), rng.uniform(0.3, 0.6)
    depths = 0.9 + pitch * np.arange(1, 9)
    canvas.fill(SIDEWALK, joint, *(_ground(-20, 20, d, d + 0.05 * d) for d in depths))
    lines = street.half_road + pitch * np.arange(1, 6)
    canvas.fill(SIDEWALK, joint, *(_ground(s * x - 0.025, s * x + 0.025, near, 9) for x in lines for s in (-1, 1)))
    canvas.fill(ROAD, asphalt, _ground(-street.half_road, street.half_road, near, far))
    paint = _scale_color((255, 255, 255), rng.uniform(0.5, 1.0))
    if rng.random() < 0.75:
        canvas.fill(ROAD, paint, *(_ground(-0.05, 0.05, d, d * 1.25) for d in 0.9 * 1.7 ** np.arange(5)))
    if rng.random() < 0.25:
        start = rng.uniform(1.2, 2.5)
        stripes = np.arange(-street.half_road + 0.1, street.half_road - 0.2, 0.4)
        canvas.fill(ROAD, paint, *(_ground(x, x + 0.2, start, start + 0.5) for x in stripes))
    if rng.random() < 0.6:
        side = float(rng.choice([-1, 1]))
        canvas.darken(_ground(side * rng.uniform(-0.5, 1.5), side * 30, near, far), rng.uniform(0.25, 0.6))


def _draw_tree(rng: Rng, canvas: _Canvas, lateral: float, depth: float) -> None:
    color, trunk = _leaf_color(rng), _hsv(rng, (0.03, 0.12), (0.1, 0.5), (0.1, 0.45))
    high, radius = rng.uniform(1.6, 3.0), rng.uniform(0.5, 1.0)
    canvas.darken(_ground(lateral - radius, lateral + radius, depth * 0.95, depth * 1.15), rng.uniform(0.2, 0.5))
    canvas.fill(TREE, trunk, _slab(lateral - 0.09, lateral + 0.09, 0, high, depth, taper=0.02))
    if rng.random() < 0.25:  # a conifer, one triangle
        canvas.fill(TREE, color, _slab(lateral - radius, lateral + radius, 0.6, high + 1, depth, taper=radius * 0.95))
        return
    for angle in rng.uniform(0, 2 * np.pi, int(rng.integers(4, 9))):
        reach, shade = rng.uniform(0.2, 0.7) * radius, rng.uniform(0.7, 1.25)
        center = (lateral + reach * float(np.cos(angle)), high + reach * float(np.sin(angle)), depth)
        canvas.disc(TREE, _scale_color(color, shade), center, radius * rng.uniform(0.45, 0.75))


def _draw_car(rng: Rng, canvas: _Canvas, lateral: float, depth: float) -> None:
    """Draws a car seen from the back or front, or, wider and with round wheels, from the side."""
    color = _hsv(rng, (0.0, 1.0), (0.0, 0.9), (0.1, 0.95))
    glass = _hsv(rng, (0.5, 0.7), (0.0, 0.4), (0.1, 0.8))
    black = _scale_color((255, 255, 255), rng.uniform(0.02, 0.2))
    from_side = rng.random() < 0.35
    half = (0.95 if from_side else 0.45) * rng.uniform(0.9, 1.2)
    belt, roof = rng.uniform(0.38, 0.48), rng.uniform(0.65, 0.9)
    left, right = lateral - half, lateral + half
    canvas.darken(_ground(left - 0.08, right + 0.08, depth * 0.97, depth * 1.1), 0.6)
    if from_side:
        canvas.fill(CAR, glass, _slab(left + 0.3, right - 0.2, belt, roof, depth, taper=0.25))
        pillar = lateral + rng.uniform(-0.15, 0.15)
        canvas.fill(CAR, color, _slab(pillar - 0.04, pillar + 0.04, belt, roof, depth))
        canvas.fill(CAR, color, _slab(left + 0.52, right - 0.42, roof - 0.06, roof + 0.02, depth))
        canvas.fill(CAR, color, _slab(left, right, 0.13, belt, depth, taper=0.06))
        for wheel in (left + 0.35, right - 0.35):
            canvas.disc(CAR, black, (wheel, 0.15, depth), 0.17)
        return
    canvas.fill(CAR, black, *(_slab(x, x + 0.17, 0, 0.2, depth) for x in (left + 0.03, right - 0.2)))
    canvas.fill(CAR, _scale_color(color, 0.85), _slab(left + 0.03, right - 0.03, belt, roof, depth, taper=0.1))
    canvas.fill(CAR, glass, _slab(left + 0.11, right - 0.11, belt + 0.03, roof - 0.06, depth, taper=0.06))
    canvas.fill(CAR, color, _slab(left, right, 0.1, belt, depth, taper=0.03))
    lamp: Rgb = (230, 30, 20) if rng.random() < 0.5 else (250, 245, 210)
    canvas.fill(CAR, lamp, *(_slab(x, x + 0.14, 0.28, 0.36, depth) for x in (left + 0.03, right - 0.17)))


def _draw_person(rng: Rng, canvas: _Canvas, lateral: float, depth: float) -> None:
    skin = _hsv(rng, (0.03, 0.1), (0.2, 0.6), (0.3, 0.95))
    coat, trousers = (_hsv(rng, (0.0, 1.0), (0.0, 0.9), (0.1, 0.95)) for _ in range(2))
    tall, wide, stride = rng.uniform(0.75, 1.1), rng.uniform(0.15, 0.22), rng.uniform(0.0, 0.15)
    canvas.darken(_ground(lateral - wide, lateral + 2 * wide, depth * 0.98, depth * 1.05), 0.5)
    for foot in (-stride, stride):
        leg = [(x, up, depth) for x, up in ((foot - 0.07, 0), (foot + 0.07, 0), (0.1, tall / 2), (-0.1, tall / 2))]
        canvas.fill(PERSON, trousers, [(lateral + x, up, d) for x, up, d in leg])
    canvas.fill(PERSON, coat, _slab(lateral - wide, lateral + wide, tall * 0.42, tall * 0.84, depth, taper=0.02))
    canvas.disc(PERSON, skin, (lateral, tall * 0.92, depth), tall * 0.11)


def _draw_objects(rng: Rng, canvas: _Canvas) -> None:
    """Draws trees on the sidewalks, cars on the road, persons everywhere; near ones cover far ones."""
    street = canvas.street
    things = []
    for side, walk in ((-1, street.left), (1, street.right)):
        for _ in range(int(rng.integers(0, 4))):
            things.append((_draw_tree, side * (street.half_road + walk * rng.uniform(0.2, 1.6)), rng.uniform(1.3, 6)))
        for _ in range(int(rng.integers(0, 4))):
            things.append(
                (_draw_person, side * (street.half_road + walk * rng.uniform(0.1, 0.9)), rng.uniform(1.05, 2.6))
            )
    for _ in range(int(rng.integers(0, 5))):
        things.append((_draw_car, rng.uniform(-1, 1) * (street.half_road - 0.4), rng.uniform(1.2, 5)))
    for _ in range(int(rng.integers(0, 3))):
        things.append((_draw_person, rng.uniform(-1, 1) * street.half_road, rng.uniform(1.1, 2.6)))
    for draw, lateral, depth in sorted(things, key=lambda thing: -thing[2]):
        draw(rng, canvas, lateral, depth)


# -------------------------------------------------------------------------------------------------------------- scene


def _smooth_noise(rng: Rng, height: int, width: int, size: int) -> NDArray[np.float32]:
    """Draws smooth noise with blobs of `size` px: float32 (H, W), about normally distributed."""
    coarse = rng.standard_normal((height // size + 2, width // size + 2), np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def _draw_sky(rng: Rng, canvas: _Canvas, above: Rgb) -> None:
    """Fills the whole image with a gradient down to the haze's colour, and clouds."""
    height, width = canvas.mask.shape
    down = np.clip(np.arange(height, dtype=np.float32) / canvas.street.horizon, 0, 1)[:, None, None]
    sky = np.array(above, np.float32) * (1 - down) + np.array(canvas.fog, np.float32) * down
    clouds = _smooth_noise(rng, height, width, max(2, height // 5)) + 0.4 * _smooth_noise(
        rng, height, width, max(2, height // 12)
    )
    cover = np.clip(clouds + rng.uniform(-1.5, 0.7), 0, 1)[:, :, None] * rng.uniform(0.2, 0.9)
    # Clouds are no darker than the sky, and can be seen at night.
    white = np.float32(max(*above, *canvas.fog, 120.0))
    canvas.image[:] = np.clip(sky + (white - sky) * cover, 0, 255).astype(np.uint8)


def _develop(rng: Rng, canvas: _Canvas) -> NDArray[np.uint8]:
    """Applies texture, shadow, light, tint, blur and the camera's noise; returns uint8 (H, W, 3)."""
    height, width = canvas.mask.shape
    grain = GRAIN * rng.uniform(0.5, 1.5, GRAIN.shape).astype(np.float32)
    blobs = np.stack([_smooth_noise(rng, height, width, size) for size in (1, 2, 6)], axis=-1)
    texture = (blobs * grain[canvas.mask]).sum(axis=-1)
    across = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * rng.uniform(-0.2, 0.2)
    light = canvas.shade * (1 + across) * rng.uniform(0.7, 1.15)
    tint = 1 + rng.uniform(-0.1, 0.1, 3)
    image = (canvas.image + texture[:, :, None]) * light[:, :, None] * tint.astype(np.float32)
    image = image + rng.uniform(0, 30)
    blur = rng.uniform(0.0, 0.9)
    if blur > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    image = image + rng.uniform(1, 5) * rng.standard_normal(image.shape, np.float32)
    return np.asarray(np.clip(np.round(image), 0, 255), np.uint8)


def draw_scene(rng: Rng, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draws one street scene: image uint8 (H, W, 3) RGB and mask uint8 (H, W) of positions in CLASSES."""
    street = _Street(
        horizon=height * rng.uniform(0.36, 0.58),
        vanish=width * rng.uniform(0.25, 0.75),
        half_road=rng.uniform(0.8, 1.9),
        left=rng.uniform(0.4, 1.4),
        right=rng.uniform(0.4, 1.4),
        haze=rng.uniform(0.0, 0.12),
    )
    above, fog = _sky_colors(rng)
    size = (height, width)
    canvas = _Canvas(
        street, fog, np.zeros((*size, 3), np.uint8), np.full(size, SKY, np.uint8), np.ones(size, np.float32)
    )
    # From the back to the front: each covers what was drawn before.
    _draw_sky(rng, canvas, above)
    _draw_skyline(rng, canvas)
    _draw_pavement(rng, canvas)
    _draw_houses(rng, canvas)
    _draw_objects(rng, canvas)
    return _develop(rng, canvas), canvas.mask


# ------------------------------------------------------------------------------------------------------------- shards


def made_by(config: SyntheticConfig) -> str:
    """Returns what the manifest of a drawn data set says of its origin: two equal texts mean the same images."""
    settings = ", ".join(f"{name}={value}" for name, value in config.model_dump().items())
    return f"synthetic drawing {DRAWING}: {settings}"


@dataclass(frozen=True)
class FromDrawing:
    """Makes items from drawn scenes; a source's id, SPLIT_NUMBER, says which."""

    config: SyntheticConfig

    def __call__(self, source: Source) -> Item:
        split, _, number = source.id.rpartition("_")
        # Each scene has a seed of its own: it does not depend on how many others there are, nor on who draws them.
        rng = np.random.default_rng((self.config.seed, _SPLITS.index(split), int(number)))
        image, mask = draw_scene(rng, self.config.height_px, self.config.width_px)
        return build_item(source.id, encode_image(image), image, mask, len(CLASSES))


def write_synthetic(out: Path, config: SyntheticConfig) -> None:
    """Draws the data set into the new folder `out`, the same bits for the same config. Raises DataError if it exists."""
    counts = (config.train, config.val, config.test)
    splits = {
        split: [Source(f"{split}_{number:05d}") for number in range(count)]
        for split, count in zip(_SPLITS, counts, strict=True)
    }
    plan = DataSetPlan(splits, FromDrawing(config), CLASSES, PALETTE, made_by(config))
    # Where several processes need the same data set at once, the first one draws it for all.
    write_shards(out, plan, wait=True)
