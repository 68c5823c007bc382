"""Synthetic captioned clips: coloured shapes that move, turn, bounce and grow over textured backgrounds.

This is the whole training world of the embedded model (`assets/tiny-wan`). A `Scene` is what a caption can say plus
what it leaves open (positions, phases, speeds); `caption(scene)` puts it into English with a small grammar and
`render(scenes)` draws it with anti-aliased signed distance functions. Everything is drawn from one
`random.Random`, so a seed is a data set.

Grammar (brackets: chosen at random, bar: alternatives):

    caption    := subject ["and" subject] "over" background | background "," "with" subject ["and" subject]
    subject    := "a" [size] colour shape motion
    motion     := "moving" ("left" | "right" | "up" | "down") ["slowly" | "quickly"]
                | ("turning" | "bouncing" | "growing" | "shrinking") place
    place      := "on the left" | "on the right" | "at the top" | "at the bottom" | "in the middle"
    background := "a" ground texture "background"

(A bouncing subject is never said to be at the top or the bottom.)

Two things are there for the directions' sake: "moving left" says where the subject is at what time, and Wan's attention
sees relative positions only. The same light falls on every clip, from the lower right, which tells one side from the
other; and "on the left" says where, alone. (Both came in together with other changes: see the model's card.)
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import torch

SIZE, FRAMES = 64, 17
"""Edge of a frame in pixels and number of frames of a clip: 8 x 8 latents in 5 latent frames."""

COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "yellow": (0.93, 0.87, 0.10),
    "green": (0.10, 0.75, 0.18),
    "cyan": (0.10, 0.83, 0.88),
    "blue": (0.13, 0.22, 0.92),
    "magenta": (0.88, 0.12, 0.82),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
OTHER_MOTIONS = ("turning", "bouncing", "growing", "shrinking")
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
LIGHT = (0.10, 0.10)
"""How much brighter the right edge is than the middle, and the lower edge, added to every pixel."""
SIZES = {"small": 0.15, "": 0.19, "big": 0.24}
GROUNDS = {  # muted on purpose: an object's colour can be found by saturation alone
    "black": ((0.05, 0.05, 0.06), (0.17, 0.17, 0.19)),
    "grey": ((0.38, 0.38, 0.40), (0.54, 0.54, 0.56)),
    "white": ((0.93, 0.93, 0.92), (0.76, 0.76, 0.77)),
    "brown": ((0.30, 0.24, 0.20), (0.44, 0.37, 0.32)),
    "slate": ((0.22, 0.26, 0.32), (0.36, 0.41, 0.48)),
    "sage": ((0.42, 0.47, 0.41), (0.58, 0.63, 0.56)),
}
TEXTURES = ("plain", "striped", "checkered", "dotted", "cloudy")


@dataclass(frozen=True)
class Subject:
    """One moving shape. Lengths are fractions of the frame's edge, angles radians, speeds per clip."""

    colour: str
    shape: str
    size: str
    motion: str
    pace: str
    place: str
    x: float
    y: float
    angle: float
    spin: float
    travel: float
    phase: float


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip, pixel for pixel."""

    subjects: tuple[Subject, ...]
    ground: str
    texture: str
    angle: float
    scale: float
    phase: tuple[float, float]
    seed: int
    template: int

    @property
    def held_out(self) -> bool:
        """True for one in sixteen combinations of what the first subject and the background say.

        Training never shows such a combination (though each of its words, in other company), so prompts made of
        them test composition, not memory.
        """
        first = self.subjects[0]
        words = " ".join((first.colour, first.shape, first.motion, self.ground, self.texture))
        return hashlib.sha256(words.encode()).digest()[0] < 16


def caption(scene: Scene) -> str:
    """The scene in English, e.g. "a big red circle moving left over a grey striped background"."""

    def subject(s: Subject) -> str:
        return " ".join(w for w in ("a", s.size, s.colour, s.shape, s.motion, s.pace, s.place) if w)

    subjects = " and ".join(subject(s) for s in scene.subjects)
    background = f"a {scene.ground} {scene.texture} background"
    return f"{background}, with {subjects}" if scene.template else f"{subjects} over {background}"


def vocabulary() -> list[str]:
    """Every word and mark the grammar can produce, sorted: the tokenizer's vocabulary."""
    words = {"a", "and", "over", "background", ",", "with", "moving", "slowly", "quickly"}
    words |= {word for place in PLACES for word in place.split()}
    words |= {*COLOURS, *SHAPES, *DIRECTIONS, *OTHER_MOTIONS, *GROUNDS, *TEXTURES, *filter(None, SIZES)}
    return sorted(words)


def random_scene(rng: random.Random, *, held_out: bool = False, directional: bool = False) -> Scene:
    """Draw a scene; `held_out`: from which side of the split, `directional`: the first subject moves straight."""
    while True:
        colours = rng.sample(sorted(COLOURS), 2)
        count = 2 if rng.random() < 0.25 else 1
        subjects = tuple(_random_subject(rng, c, directional and i == 0) for i, c in enumerate(colours[:count]))
        scene = Scene(
            subjects=subjects,
            ground=rng.choice(sorted(GROUNDS)),
            texture=rng.choice(TEXTURES),
            angle=rng.uniform(0, math.pi),
            scale=rng.uniform(0.8, 1.25),
            phase=(rng.random(), rng.random()),
            seed=rng.getrandbits(32),
            template=int(rng.random() < 0.3),
        )
        if scene.held_out == held_out:
            return scene


def _random_subject(rng: random.Random, colour: str, directional: bool) -> Subject:
    size = rng.choice(sorted(SIZES))
    straight = directional or rng.random() < 0.64
    motion = f"moving {rng.choice(sorted(DIRECTIONS))}" if straight else rng.choice(OTHER_MOTIONS)
    pace = rng.choice(("", "", "slowly", "quickly")) if straight else ""
    place = "" if straight else rng.choice([p for p, (_, dy) in PLACES.items() if motion != "bouncing" or not dy])
    margin = SIZES[size] + 0.02
    travel = {"slowly": 0.28, "": 0.42, "quickly": 0.56}[pace] * rng.uniform(0.9, 1.1)
    x, y = (rng.uniform(margin, 1 - margin) for _ in range(2))
    if straight:  # centre the path on the frame, with what slack is left
        dx, dy = DIRECTIONS[motion.split()[1]]
        slack = max(0.0, 1 - 2 * margin - travel) / 2
        offset = 0.5 + rng.uniform(-slack, slack)
        x, y = (offset - dx * travel / 2, y) if dx else (x, offset - dy * travel / 2)
    else:
        x, y = (0.5 + 0.24 * side + rng.uniform(-0.08, 0.08) for side in PLACES[place])
    spin = rng.choice((-1.0, 1.0)) * rng.uniform(0.8, 1.2) * (1.6 if motion == "turning" else 0.0)
    shape, angle, phase = rng.choice(SHAPES), rng.uniform(-0.3, 0.3), rng.random()
    return Subject(colour, shape, size, motion, pace, place, x, y, angle, spin, travel, phase)


def render(scenes: list[Scene]) -> torch.Tensor:
    """Draw clips: float32 tensor (len(scenes), 3, FRAMES, SIZE, SIZE) in [-1, 1]."""
    return torch.stack([_render_one(scene) for scene in scenes]) * 2 - 1


def _render_one(scene: Scene) -> torch.Tensor:
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    low, high = (torch.tensor(c).view(3, 1, 1) for c in GROUNDS[scene.ground])
    ground = low + (high - low) * _texture(scene, x, y)
    clip = ground.unsqueeze(1).repeat(1, FRAMES, 1, 1)
    time = torch.linspace(0, 1, FRAMES).view(-1, 1, 1)
    for subject in reversed(scene.subjects):  # the first one is drawn last: it is never hidden
        alpha = _coverage(subject, x, y, time)
        colour = torch.tensor(COLOURS[subject.colour]).view(3, 1, 1, 1)
        clip = clip + (colour - clip) * alpha
    light = LIGHT[0] * (2 * x - 1) + LIGHT[1] * (2 * y - 1)
    return (clip + light).clamp(0, 1)


def _texture(scene: Scene, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The background pattern in [0, 1], one value per pixel."""
    u = (x * math.cos(scene.angle) + y * math.sin(scene.angle)) * 5 * scene.scale + scene.phase[0]
    v = (-x * math.sin(scene.angle) + y * math.cos(scene.angle)) * 5 * scene.scale + scene.phase[1]
    soft = lambda wave: torch.sigmoid(5 * wave)  # noqa: E731 - edges about two pixels wide
    tau = 2 * math.pi
    if scene.texture == "plain":
        return torch.zeros_like(x)
    if scene.texture == "striped":
        return soft(torch.sin(tau * u))
    if scene.texture == "checkered":
        return soft(1.5 * torch.sin(tau * u * 0.7) * torch.sin(tau * v * 0.7))
    if scene.texture == "dotted":
        return soft(2 * (torch.cos(tau * u * 0.9) + torch.cos(tau * v * 0.9) - 0.7))
    generator = torch.Generator().manual_seed(scene.seed)
    coarse = torch.rand(1, 1, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=x.shape, mode="bicubic", align_corners=True)[0, 0].clamp(0, 1)


def _coverage(s: Subject, x: torch.Tensor, y: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """How much of each pixel the subject covers, (FRAMES, SIZE, SIZE) in [0, 1]."""
    radius = torch.full_like(time, SIZES[s.size])
    cx, cy = torch.full_like(time, s.x), torch.full_like(time, s.y)
    if s.motion.startswith("moving"):
        dx, dy = DIRECTIONS[s.motion.split()[1]]
        cx, cy = cx + dx * s.travel * time, cy + dy * s.travel * time
    elif s.motion == "bouncing":
        floor, top = 1 - SIZES[s.size], SIZES[s.size] + 0.08
        cy = floor - (floor - top) * (torch.sin(math.pi * (2 * time + s.phase))).abs()
    elif s.motion == "growing":
        radius = radius * (0.45 + 1.0 * time)
    elif s.motion == "shrinking":
        radius = radius * (1.45 - 1.0 * time)
    angle = s.angle + s.spin * time
    px, py = (x - cx) / radius, (y - cy) / radius
    px, py = px * torch.cos(angle) + py * torch.sin(angle), py * torch.cos(angle) - px * torch.sin(angle)
    pixel = 1 / (SIZE * radius)
    return (0.5 - _distance(s.shape, px, py) / (1.5 * pixel)).clamp(0, 1)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance (approximate for the star) to a shape of unit radius centred on the origin."""
    r = (x * x + y * y).sqrt()
    if shape == "circle":
        return r - 0.9
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.8
    if shape == "ring":
        return (r - 0.72).abs() - 0.24
    if shape == "cross":
        bar = lambda a, b: torch.maximum(a.abs() - 0.95, b.abs() - 0.32)  # noqa: E731
        return torch.minimum(bar(x, y), bar(y, x))
    if shape == "triangle":
        return torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.5
    theta = torch.atan2(x, -y)
    lobe = (theta * 5 / (2 * math.pi) + 0.5).remainder(1.0) - 0.5
    return (r - (1.05 - 1.15 * lobe.abs())) * 0.6
