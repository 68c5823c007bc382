"""Looking back: a computed step shows what the predictions before it missed, and the latent is put right.

Where steps k1 < k are computed and those between are predicted, output k tells how the outputs between really went:
they are interpolated between the two ends instead of extrapolated from the first. The latent that would have come of
that is known without an evaluation, because samplers are linear in the outputs (`sampler.response`), and the next
outputs are handed on such that the sampler arrives exactly there (`Ledger`).

Output k itself was computed at the old latent. Guidance makes the output follow the latent, the more so the lower
the frequency: it was as if evaluated at the new latent once `feedback` times the latent's move is added. Without that,
wide gaps make multistep samplers swing; with it the rule is that of an implicit (trapezoidal) integrator, and stable.
Prompts differ in their feedback several times over. But whether what was added came true shows at the next computed
step: its prediction with the addition is compared with the one without, and the feedback goes on by the factor that
would have been right, for every sample and band (`Ledger._learn`). No evaluation is spent on any of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stepcache.core.plan import HindsightSettings
from stepcache.hindsight.response import noise_levels
from stepcache.hindsight.selfcheck import split_bands

SHORT = 3
"""Steps of a gap up to which all of it is put right where the feedback is not known; longer ones (SHORT / gap)^2."""


WIDE = 0.1
"""Share of the run up to which a gap may be extrapolated with the full floor; in wider ones it falls with 1 / gap."""


LEAST, MOST, AVERAGE = 0.3, 2.0, 0.5
"""Bounds of the factor on the feedback that a run finds right, and the share of the last one in the new."""


SETTLED = 1e-5
"""Relative change of a response below which it counts as constant."""


@dataclass(frozen=True)
class _Node:
    """A computed step: its output as if evaluated at the latent put right, and what that added to it."""

    step: int
    output: torch.Tensor
    shift: torch.Tensor | None


class Ledger:
    """What the sampler was handed, against what it should have been: the guided outputs of one run.

    Every call of `reused` or `computed` is one step, in their order, and gives what must be added to the guided output
    before it is handed on; `None` is nothing.

    Args:
        answers: the sampler's response, float64 (S + 1, S + 1).
        settings: of the plan.
        strength: guidance scale - 1, what the feedback is in proportion to; 0 where there is no guidance.
        grid: height and width of a latent that comes as tokens (batch, frames * height * width, channels).
        batched: the first dimension counts samples; else all is one sample.
        device: where tensors are held between steps; default: where they were made.

    Raises:
        ValueError: a sampler that does not answer to one of its outputs at once.
    """

    def __init__(
        self,
        answers: torch.Tensor,
        settings: HindsightSettings,
        strength: float = 0.0,
        grid: tuple[int, int] | None = None,
        batched: bool = True,
        device: torch.device | None = None,
    ) -> None:
        moves = answers[1:, 1:].double().cpu()
        scale = moves.abs().amax(0).clamp_min(1e-300)
        if bool((moves.diagonal().abs() < 1e-6 * scale).any()):
            raise ValueError("the sampler does not answer to an output in its own step, so nothing can be put right.")
        changing = (moves - moves[-1]).abs() > SETTLED * scale
        steps = torch.arange(1, len(moves) + 1)[:, None]
        self._settles = (changing * steps).amax(0).tolist()  # row from which on a column stays as it is
        self._moves: list[list[float]] = moves.tolist()
        self._levels = noise_levels(answers.double().cpu())
        self._settings, self._strength, self._grid, self._device = settings, strength, grid, device
        self._batched = batched
        self._factors: list[torch.Tensor] = []  # one a band: what the run found of the feedback
        self._nodes: list[_Node] = []
        self._gap: list[tuple[int, torch.Tensor]] = []
        self._owed: dict[int, torch.Tensor] = {}
        self._settled: torch.Tensor | None = None

    @property
    def follows(self) -> bool:
        """Whether the feedback is known, so that extrapolations may be trusted (`HindsightSettings.floor`)."""
        return self._strength > 0 and self._levels is not None and any(self._settings.feedback)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps."""
        nodes = [t for node in self._nodes for t in (node.output, node.shift) if t is not None]
        settled = [] if self._settled is None else [self._settled]
        return [*nodes, *(t for _, t in self._gap), *self._owed.values(), *settled]

    def reused(self, step: int, predicted: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor | None:
        """A reused step, predicted with `weights` over the last computed outputs, newest first; float32."""
        shift = self._shifted(weights, predicted.device)
        self._gap.append((step, self._held(predicted if shift is None else predicted + shift)))
        return _sum([shift, self._due(step, predicted.device)])

    def computed(
        self, step: int, output: torch.Tensor, expected: torch.Tensor | None = None, weights: tuple[float, ...] = (1.0,)
    ) -> torch.Tensor | None:
        """A computed step; the gap before it is put right. Float32.

        `expected` is what would have been predicted there with `weights`; the factors on the feedback learn from it.
        """
        if expected is not None and self.follows:
            self._learn(output - expected, self._shifted(weights, output.device))
        shift = self._put_right(step, output) if self._gap and self._nodes else None
        truth = output if shift is None else output + shift
        self._nodes = [
            _Node(step, self._held(truth), None if shift is None else self._held(shift)),
            *self._nodes[:1],
        ]
        self._gap.clear()
        return _sum([shift, self._due(step, output.device)])

    def interrupted(self) -> None:
        """Another transformer takes over: outputs before and after are not of one curve."""
        self._nodes.clear()
        self._gap.clear()

    def _put_right(self, step: int, output: torch.Tensor) -> torch.Tensor | None:
        """Interpolate the gap before `step`; gives what the moved latent adds to the step's own output."""
        start, first = self._nodes[0].step, self._nodes[0].output.to(output.device)
        share = 1.0 if self.follows else min(1.0, (SHORT / (step - start)) ** 2)
        gap = [(s, (s - start) / (step - start), used.to(output.device)) for s, used in self._gap]
        arrived = self._moves[step - 1]
        moved, reach = torch.zeros_like(output), 0.0
        for s, along, used in gap:
            moved += arrived[s] * share * (torch.lerp(first, output, along) - used)
            reach += arrived[s] * share * along
        shift = self._fed_back(step, moved, reach)
        end = output if shift is None else output + shift
        for s, along, used in gap:
            self._owe(s, share * (torch.lerp(first, end, along) - used))
        return shift

    def _fed_back(self, step: int, moved: torch.Tensor, reach: float) -> torch.Tensor | None:
        """What the output adds where the latent moves by `moved` + `reach` times that very addition, band by band."""
        if not self.follows or self._levels is None:
            return None
        clean = 1 - self._levels[step]
        rate = self._strength * min(clean / self._settings.knee, 1.0) / max(clean, 1e-3)
        parts = split_bands(moved, self._settings.bands, self._grid)
        self._factors = self._factors or [torch.ones((), device=moved.device) for _ in parts]
        known = zip(self._factors, self._settings.feedback[-len(parts) :], parts, strict=True)  # one band: the finest
        feedback = [(rate * f * factor, part) for factor, f, part in known]
        return _sum([f / (1 - f * reach).clamp_min(1.0) * part for f, part in feedback])

    def _learn(self, missed: torch.Tensor, shift: torch.Tensor | None) -> None:
        """Was what the feedback added to the prediction too much or too little? `missed` leaves it out altogether."""
        if shift is None or not self._factors:
            return
        over = list(range(1 if self._batched else 0, missed.ndim))
        edges, grid = self._settings.bands, self._grid
        bands = zip(split_bands(missed, edges, grid), split_bands(shift, edges, grid), strict=True)
        for i, (needed, given) in enumerate(bands):
            size = given.square().sum(over, keepdim=True)
            found = self._factors[i] * (needed * given).sum(over, keepdim=True) / size
            mixed = AVERAGE * self._factors[i] + (1 - AVERAGE) * found.clamp(LEAST, MOST)
            self._factors[i] = torch.where(size > 0, mixed, self._factors[i]).nan_to_num(1.0)

    def _shifted(self, weights: tuple[float, ...], device: torch.device) -> torch.Tensor | None:
        """What the feedback of the last computed steps adds to a prediction with `weights` over them."""
        shifts = [(w, node.shift) for w, node in zip(weights, self._nodes, strict=False) if node.shift is not None]
        return _sum([w * s.to(device) for w, s in shifts])

    def _owe(self, step: int, amount: torch.Tensor) -> None:
        held = self._owed.get(step)
        self._owed[step] = self._held(amount if held is None else held.to(amount.device) + amount)

    def _due(self, step: int, device: torch.device) -> torch.Tensor | None:
        """What handed on at `step` brings the next latent to where it should be; it is owed back from then on."""
        row = self._moves[step]
        owed = [row[s] / row[step] * amount.to(device) for s, amount in self._owed.items() if row[s]]
        settled = [] if self._settled is None else [self._settled.to(device) / row[step]]
        due = _sum([*owed, *settled])
        if due is not None:
            self._owe(step, -due)
        for s in [s for s in self._owed if self._settles[s] <= step + 1]:  # later latents answer to it all alike
            part = self._moves[-1][s] * self._owed.pop(s)
            self._settled = part if self._settled is None else self._settled + part
        return due

    def _held(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._device is None else x.to(self._device)


@dataclass(frozen=True)
class _Seen:
    """What came of one branch in the present step; float32."""

    output: torch.Tensor
    computed: bool
    expected: torch.Tensor | None


class LookBack:
    """Finds what the sampler makes of a run's branches, and keeps their ledger.

    What guidance mixes is seen, not asked for: the first move of the latent is a sum of the first outputs, whose
    shares are fitted (5 and -4 for a guidance scale of 5). One call that holds both branches, one half each, is known
    by its halves' latents, which are equal. The branch that comes last in a step carries the correction for all.
    """

    def __init__(self, settings: HindsightSettings, answers: torch.Tensor, device: torch.device | None = None) -> None:
        self.settings, self._answers, self._device = settings, answers, device
        self.shares: dict[str, float] = {}
        self._firsts: dict[str, torch.Tensor] = {}
        self._ledger: Ledger | None = None
        self._halves = False
        self._seen: dict[str, _Seen] = {}
        self._step = 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps."""
        return [*self._firsts.values(), *(self._ledger.tensors if self._ledger else [])]

    def floor(self, gap: int) -> float:
        """Least gain of the self-check in a gap of so many steps from one computed step to the next."""
        if self._ledger is None or not self._ledger.follows:
            return 0.0
        return self.settings.floor * min(1.0, WIDE * (len(self._answers) - 1) / gap)

    def moved(self, x: torch.Tensor, start: torch.Tensor, grid: tuple[int, int] | None, batched: bool = True) -> str:
        """The latents of steps 1 and 0, in the outputs' shape; an empty sentence, or why there is no looking back."""
        names = list(self._firsts)
        outputs = [self._firsts[n].float() for n in names]
        if any(o.shape != x.shape for o in outputs):
            return "the outputs are not of the latent's shape"
        move = (x.float() - float(self._answers[1, 0]) * start.float()) / float(self._answers[1, 1])
        half = len(x) // 2
        self._halves = len(names) == 1 and len(x) % 2 == 0 and x.ndim > 1 and torch.equal(x[:half], x[half:])
        if self._halves:
            outputs, move = [outputs[0][:half], outputs[0][half:]], move[:half]
            names = [names[0], ""]
        shares = _fitted(outputs, move)
        if shares is None:
            return "the latent's first move is not a sum of the outputs"
        self.shares = dict(zip(names, shares, strict=True))
        try:
            strength = -sum(min(share, 0.0) for share in shares)
            self._ledger = Ledger(self._answers, self.settings, strength, grid, batched, self._device)
        except ValueError as error:
            return str(error)
        self._ledger.computed(0, _mixed(outputs, shares))
        self._firsts = {}
        return ""

    def hand_on(
        self,
        step: int,
        branch: str,
        output: torch.Tensor,
        computed: bool,
        weights: tuple[float, ...],
        expected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output of a branch as it goes to the sampler, in its own dtype.

        Args:
            step: of the run.
            branch: its name.
            output: what came of the call, or was predicted.
            computed: whether it was evaluated.
            weights: of the prediction over the last computed outputs.
            expected: of a computed step, what would have been predicted.

        Raises:
            KeyError: a branch that step 0 had not, or not in that order, or one of those is missing.
        """
        ledger = self._ledger
        if ledger is None:
            self._firsts[branch] = output.detach()
            return output
        if self._seen and step != self._step:
            raise KeyError(branch)
        self._step = step
        value = output.detach().float()
        for name, part, wanted in zip(*self._parts(branch, value, expected), strict=True):
            self._seen[name] = _Seen(part, computed, wanted)
        if list(self._seen)[-1] != list(self.shares)[-1]:
            return output
        seen, self._seen = [self._seen[name] for name in self.shares], {}
        shares = list(self.shares.values())
        guided = _mixed([s.output for s in seen], shares)
        if all(s.computed for s in seen):
            wanting = [s.expected for s in seen if s.expected is not None]
            due = ledger.computed(step, guided, _mixed(wanting, shares) if len(wanting) == len(seen) else None, weights)
        else:
            due = ledger.reused(step, guided, weights)
        if due is None:
            return output
        added = torch.cat([due, due]) / sum(shares) if self._halves else due / shares[-1]
        return (value + added).to(output.dtype)

    def _parts(
        self, branch: str, value: torch.Tensor, expected: torch.Tensor | None
    ) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor | None]]:
        """The branches in a call: their names, outputs, and what was expected of them."""
        if not self._halves:
            return [branch], [value], [expected]
        wanted: list[torch.Tensor | None] = [None, None] if expected is None else list(expected.chunk(2))
        return list(self.shares), list(value.chunk(2)), wanted

    def interrupted(self) -> None:
        """Another transformer takes over."""
        if self._ledger is not None:
            self._ledger.interrupted()


def _fitted(outputs: list[torch.Tensor], move: torch.Tensor) -> list[float] | None:
    """Shares with which `outputs` add up to `move` (least squares); `None` if they are nothing like guidance's."""
    rows = [o.flatten().double() for o in outputs]
    normal = torch.stack([torch.stack([a @ b for b in rows]) for a in rows]).cpu()
    right = torch.stack([a @ move.flatten().double() for a in rows]).cpu()
    shares = torch.linalg.lstsq(normal, right).solution.tolist()
    plausible = all(math.isfinite(s) and 1e-3 < abs(s) < 100 for s in shares) and 0.5 < sum(shares) < 1.5
    return shares if plausible else None


def _mixed(outputs: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    total = outputs[0] * shares[0]
    for share, output in zip(shares[1:], outputs[1:], strict=True):
        total = torch.add(total, output, alpha=share)
    return total


def _sum(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The sum of those that are there."""
    there = [p for p in parts if p is not None]
    return None if not there else there[0] if len(there) == 1 else torch.stack(there).sum(0)
