"""Drawing a `Scene`: 64 x 64 pixels in one of four styles.

Silhouettes are painted four times too large with Pillow, as a canvas of labels (nothing, body, limb, eye);
each label's share of a pixel becomes its opacity, and colours are mixed in NumPy. About 3 ms a picture.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .colors import COLORS, GRAY
from .shapes import NOUNS
from .world import Scene, Thing

SIZE = 64  # pixels of a finished picture
SCALE = 4  # each pixel is the mean of SCALE x SCALE painted ones
CANVAS = SIZE * SCALE
BLOCK = 4  # pixels of a block of pixel art
INK = np.array((24, 22, 26), dtype=np.float32)
PAPER = np.array((250, 246, 234), dtype=np.float32)
LABELS = {"hole": 0, "body": 1, "limb": 2, "white": 3, "dark": 4}
GRID = (np.arange(CANVAS, dtype=np.float32) + 0.5) / SCALE  # middles of canvas points, in pixels


def rgb(color: str) -> np.ndarray:
    return np.array(GRAY if color == "gray" else COLORS[color], dtype=np.float32)


def coverage(mask: np.ndarray, cells: int = SIZE) -> np.ndarray:
    """(CANVAS, CANVAS) booleans -> (cells, cells, 1) shares in [0, 1]."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).reduce(CANVAS // cells)
    return np.asarray(image, dtype=np.float32)[..., None] / 255


def grow(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Widen a silhouette, or for negative `pixels` narrow it: a blur and a threshold."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(abs(pixels) * SCALE))
    return np.asarray(image) > (26 if pixels > 0 else 229)


def mix(below: np.ndarray, color: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    return below + (color - below) * opacity


def labels(thing: Thing) -> np.ndarray:
    """(CANVAS, CANVAS) uint8: which part of the thing each point shows."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    a = np.deg2rad(thing.angle)
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    for part in thing.parts or NOUNS[thing.noun]:
        points = part.points * (-1, 1) if thing.flip else part.points
        points = (points @ turn * thing.radius + (thing.x, thing.y)) * SCALE
        pen.polygon([tuple(p) for p in points.tolist()], fill=LABELS[part.role])
    return np.asarray(canvas)


def pattern(thing: Thing, direction: int) -> np.ndarray:
    """Where the second colour goes: (CANVAS, CANVAS) booleans. `direction` of stripes: 0, 1 or 2."""
    unit = 4.0 * float(np.clip(thing.radius / 18, 0.85, 1.35))  # width of a stripe
    a = np.deg2rad(thing.angle)
    dx, dy = GRID[None, :] - thing.x, GRID[:, None] - thing.y
    u, v = np.cos(a) * dx - np.sin(a) * dy, np.sin(a) * dx + np.cos(a) * dy
    if thing.pattern == "striped":
        w = (u, v, (u + v) * 0.7071)[direction]
        return np.floor(w / unit + 0.5) % 2 == 1
    if thing.pattern == "checkered":
        return (np.floor(u / (1.3 * unit)) + np.floor(v / (1.3 * unit))) % 2 == 1
    step = 2.3 * unit  # dots: on a hexagonal lattice, one of them in the middle
    row = np.floor(v / (0.87 * step) + 0.5)
    du = u / step - 0.5 * (row % 2)
    du, dv = (du - np.floor(du + 0.5)) * step, v - row * 0.87 * step
    return du * du + dv * dv < (0.72 * unit) ** 2


def paint_thing(picture: np.ndarray, thing: Thing, style: str, rng: np.random.Generator) -> np.ndarray:
    label = labels(thing)
    direction = int(rng.integers(3))
    direction = direction if thing.stripes is None else thing.stripes
    if style == "painting":  # an unsteady hand: points are taken from a little way off
        phase = rng.uniform(0, 2 * np.pi, 4)
        wave = 0.75 * SCALE * (np.sin(GRID / 2.6 + phase[0]) + 0.6 * np.sin(GRID / 1.5 + phase[1]))
        wave2 = 0.75 * SCALE * (np.sin(GRID / 2.4 + phase[2]) + 0.6 * np.sin(GRID / 1.7 + phase[3]))
        ys = np.clip(np.arange(CANVAS)[:, None] + wave[None, :], 0, CANVAS - 1).astype(np.int32)
        xs = np.clip(np.arange(CANVAS)[None, :] + wave2[:, None], 0, CANVAS - 1).astype(np.int32)
        label = label[ys, xs]
    silhouette, body = label > 0, label == 1
    first, second = rgb(thing.color), rgb(thing.color2 or thing.color)
    shade = np.ones((SIZE, SIZE, 1), dtype=np.float32)
    if style == "photo":
        shadow = Image.fromarray(silhouette.astype(np.uint8) * 255).reduce(SCALE)
        shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(1.6)), dtype=np.float32)[..., None]
        picture = picture * (1 - 0.45 / 255 * np.roll(shadow, (3, 3), axis=(0, 1)))
        at = np.arange(SIZE, dtype=np.float32)
        light = (at[None, :] - thing.x + at[:, None] - thing.y) / thing.radius
        shade = np.clip(1.02 - 0.13 * light, 0.8, 1.15)[..., None]
    if style == "drawing":
        picture = mix(picture, INK, coverage(grow(silhouette, 1.7)))
        body = body & grow(body, -0.8)
    opacity = coverage(body)
    picture = mix(picture, first * shade, opacity)
    if thing.pattern != "plain":  # a rim of the first colour keeps the silhouette whole
        figure = pattern(thing, direction) & body & grow(body, -1.6)
        picture = mix(picture, second * shade, coverage(figure))
    limb = label == 2
    if style == "drawing":
        limb = grow(limb, -0.8)
    picture = mix(picture, second * shade, coverage(limb))
    picture = mix(picture, rgb("white"), coverage(label == 3))
    return mix(picture, INK, coverage(label == 4))


def pixel_thing(blocks: np.ndarray, thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """The same on a grid of blocks, each of one colour."""
    cells = SIZE // BLOCK
    label = labels(thing)
    direction = int(rng.integers(3))
    direction = direction if thing.stripes is None else thing.stripes
    share = np.concatenate([coverage(label == k, cells) for k in range(5)], axis=-1)
    share[..., 4] *= 4  # an eye is smaller than a block
    which = np.where(share[..., 0] > 0.5, 0, 1 + share[..., 1:].argmax(-1))
    colors = np.stack([rgb(thing.color), rgb(thing.color2 or thing.color), rgb("white"), INK])
    blocks = np.where((which > 0)[..., None], colors[np.maximum(which, 1) - 1], blocks)
    if thing.pattern == "plain":
        return blocks
    body = np.pad(which == 1, 1)
    inside = body[1:-1, 1:-1] & body[:-2, 1:-1] & body[2:, 1:-1] & body[1:-1, :-2] & body[1:-1, 2:]
    v, u = np.mgrid[:cells, :cells]
    v, u = v - int(thing.y // BLOCK), u - int(thing.x // BLOCK)
    figure = {
        "striped": ((u % 2, v % 2, (u + v) // 2 % 2)[direction]) == 0,
        "checkered": (u + v) % 2 == 0,
        "dotted": (u % 2 == 0) & (v % 2 == 0),
    }[thing.pattern]
    return np.where((figure & inside)[..., None], colors[1], blocks)


def backdrop(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) float32, 0 to 255: a plain wall or a view."""
    horizon = float(rng.uniform(30, 42))
    if scene.background in COLORS or scene.background == "gray":
        picture = np.tile(rgb(scene.background), (SIZE, SIZE, 1))
        if scene.style == "photo":
            picture = picture * np.linspace(1.05, 0.9, SIZE, dtype=np.float32)[:, None, None]
        return picture
    k = 2
    canvas = Image.new("RGB", (SIZE * k, SIZE * k))
    pen = ImageDraw.Draw(canvas)

    def band(top: float, bottom: float, color: tuple[int, int, int]) -> None:
        pen.rectangle((0, top * k, SIZE * k, bottom * k), fill=color)

    def dot(x: float, y: float, r: float, color: tuple[int, int, int]) -> None:
        pen.ellipse(((x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k), fill=color)

    if scene.background == "grass":
        band(0, horizon, (150, 208, 250))
        band(horizon, SIZE, (88, 176, 72))
        for x in np.arange(4, SIZE, 14) + rng.uniform(-2, 2):
            y = horizon + rng.uniform(4, 22)
            pen.polygon(
                [(x * k, (y - 5) * k), ((x - 2) * k, y * k), ((x + 2) * k, y * k)], fill=(52, 132, 50)
            )
    elif scene.background == "beach":
        band(0, horizon - 9, (128, 206, 250))
        band(horizon - 9, horizon, (28, 130, 190))
        band(horizon, SIZE, (240, 214, 150))
        dot(rng.uniform(6, 58), 8, 4.5, (255, 240, 150))
    elif scene.background == "night":
        band(0, horizon + 8, (24, 24, 76))
        band(horizon + 8, SIZE, (44, 44, 58))
        for _ in range(9):
            dot(rng.uniform(2, 62), rng.uniform(2, horizon + 3), 0.9, (255, 250, 210))
    else:
        band(0, horizon, (176, 196, 222))
        band(horizon, SIZE, (240, 245, 252))
        for _ in range(12):
            dot(rng.uniform(2, 62), rng.uniform(2, 62), 1.1, (255, 255, 255))
    if scene.style == "drawing":
        pen.line((0, horizon * k, SIZE * k, horizon * k), fill=(24, 22, 26), width=int(1.5 * k))
    return np.asarray(canvas.reduce(k), dtype=np.float32)


def brush_strokes(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Broad slanting streaks, lighter and darker."""
    noise = Image.fromarray(rng.standard_normal((18, 6)).astype(np.float32))
    big = noise.resize((112, 112), Image.Resampling.BICUBIC).rotate(30, Image.Resampling.BILINEAR)
    streaks = np.asarray(big, dtype=np.float32)[24 : 24 + SIZE, 24 : 24 + SIZE, None]
    return picture * (1 + 0.075 * np.clip(streaks, -2, 2)) + 4 * streaks


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: (64, 64, 3) uint8."""
    rng = np.random.default_rng(scene.detail)
    picture = backdrop(scene, rng)
    if scene.style == "pixel art":
        cells = SIZE // BLOCK
        blocks = picture.reshape(cells, BLOCK, cells, BLOCK, 3)[:, 1, :, 1]
        for thing in scene.things:
            blocks = pixel_thing(blocks, thing, rng)
        picture = blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
    else:
        for thing in scene.things:
            picture = paint_thing(picture, thing, scene.style, rng)
    if scene.style == "painting":
        picture = brush_strokes(picture, rng)
    if scene.style == "drawing":  # a sheet of paper shows around the drawing
        picture[:3], picture[-3:], picture[:, :3], picture[:, -3:] = PAPER, PAPER, PAPER, PAPER
    if scene.look == "dark":
        picture = 0.7 * picture
    elif scene.look == "bright":
        picture = 255 - 0.75 * (255 - picture)
    elif scene.look == "dirty":
        stains = Image.new("L", (SIZE, SIZE))
        for x, y, r in rng.uniform((4, 4, 1.2), (60, 60, 3.0), (9, 3)):
            ImageDraw.Draw(stains).ellipse((x - r, y - r, x + r, y + r), fill=150)
        picture = mix(
            picture,
            np.array((88, 70, 48), dtype=np.float32),
            np.asarray(stains, dtype=np.float32)[..., None] / 255,
        )
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def sheet(pictures: list[np.ndarray], columns: int = 16, zoom: int = 2) -> Image.Image:
    """A contact sheet."""
    h, w = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    canvas = np.zeros((rows * h, columns * w, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        y, x = divmod(i, columns)
        canvas[y * h : (y + 1) * h, x * w : (x + 1) * w] = picture
    return Image.fromarray(canvas).resize((columns * w * zoom, rows * h * zoom), Image.Resampling.NEAREST)
