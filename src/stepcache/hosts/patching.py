"""Enter modules of unknown code: others may wrap, compile or copy them meanwhile, and their blocks vary."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from stepcache.core.cache import StepCache
from stepcache.core.strategy import Call
from stepcache.core.tensors import as_float
from stepcache.hosts.entering import ABSENT, BlockStack, Entrance, Method

MOST_CONDITIONS = 16
"""Conditioning tensors that are remembered; no guidance has more in one run."""


class LastingPatches:
    """As `Patches`, for objects that others wrap, compile, copy or pickle while ours is in place."""

    def __init__(self) -> None:
        self._ours: list[_Ours] = []
        self.active = True

    def set(
        self,
        target: Any,
        name: str,
        make: Callable[[Method], Method],
        original: Method | None = None,
        copies: Callable[[Any], Callable[[Method], Method]] | None = None,
    ) -> None:
        """Put `make(original)` in place of `target.name`; it passes calls through once `restore` has run.

        `copies`: copy -> its own `make`; without, a copy of the target has the class's own method again.
        """
        own = vars(target)  # not getattr and setattr: a compiled module would pass them on to the module inside
        ours = _Ours(self, target, name, own.get(name, ABSENT), original or getattr(target, name), make, copies)
        own[name] = ours
        self._ours.append(ours)

    def enter(self, module: torch.nn.Module, make: Callable[[Method], Method]) -> None:
        """Put `make(original)` around `module(...)`, outside of all that others wrap around its `forward`.

        `nn.Module.__call__` looks for `_compiled_call_impl` on the instance before it goes on to hooks and `forward`.
        Standing there, a skipped call onloads no offloaded weights and enters no compiled graph, and libraries that
        put their own `forward` in and out (accelerate does, after every run) do not undo ours. What is compiled
        must be compiled before.

        Raises:
            ValueError: the module has a cache already.
        """
        if isinstance(module._compiled_call_impl, _Ours) and module._compiled_call_impl.active:
            raise ValueError(f"this {type(module).__name__} has a cache already; remove that one first.")
        self.set(module, "_compiled_call_impl", make, module._compiled_call_impl or module._call_impl)

    def overridden(self) -> bool:
        """Whether other code has replaced one of our calls, as `module.compile()` does."""
        return any(not ours.on_top for ours in self._ours if ours.name == "_compiled_call_impl")

    def restore(self) -> None:
        """Put everything back; where other code has wrapped our method since, ours stays and passes calls through."""
        self.active = False
        for ours in reversed(self._ours):
            ours.take_out()
        self._ours.clear()


class _Ours:
    """A method of ours on another's object.

    It shows the signature of the one it replaces (pipelines look at it), passes calls through once the patches are
    undone, and does not come along when the object is copied.
    """

    def __init__(
        self,
        patches: LastingPatches,
        target: Any,
        name: str,
        before: Any,
        original: Method,
        make: Callable[[Method], Method],
        copies: Callable[[Any], Callable[[Method], Method]] | None = None,
    ) -> None:
        functools.update_wrapper(self, original)
        self._patches, self._target, self.name = patches, target, name
        self._before, self._original, self._copies = before, original, copies

        @functools.wraps(original)
        def below(*args: Any, **kwargs: Any) -> Any:  # by name: what is below may be taken out while we stay
            return self._original(*args, **kwargs)

        self._replaced = make(below)

    @property
    def active(self) -> bool:
        return self._patches.active

    @property
    def on_top(self) -> bool:
        return vars(self._target).get(self.name) is self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._replaced if self.active else self._original)(*args, **kwargs)

    def take_out(self) -> None:
        """Restore what was there, on the object or below another method of ours."""
        own, above = vars(self._target), vars(self._target).get(self.name)
        if above is self:
            if self._before is ABSENT:
                del own[self.name]
            else:
                own[self.name] = self._before
        while isinstance(above, _Ours) and above is not self:
            if above._before is self:
                above._before, above._original = self._before, self._original
            above = above._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self._target))
        if twin is None:
            return self
        bare = getattr(type(twin), self.name).__get__(twin)
        return _Ours(self._patches, twin, self.name, ABSENT, bare, self._copies(twin)) if self._copies else bare

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._target, self.name)  # looked up before the state is there: the class's own method


def inside(module: Any) -> Any:
    """The module in the wrappings of torch.compile, FSDP, DDP or peft, whose signature and parts tell something."""
    wrapped = list(inspect.signature(type(module).forward).parameters)[1:] == ["args", "kwargs"]
    for name in ("_orig_mod", "_fsdp_wrapped_module", "base_model", "module", "model"):
        inner = getattr(module, "_modules", {}).get(name)
        if inner is not None and (wrapped or name == "_orig_mod"):
            return inside(inner)
    return module


class Branches:
    """Names for a run's conditioning streams, from the identity or the content of their conditioning tensors."""

    def __init__(self) -> None:
        self._known: list[tuple[str, torch.Tensor]] = []

    def name(self, condition: torch.Tensor) -> str:
        """The branch that a conditioning tensor belongs to; a new one if it is like none before.

        Some pipelines make their tensors anew at every step: one that is equal to a branch's is that branch's. One
        that is new in content (a prompt that changes in the run) begins a branch, and the oldest is forgotten.
        """
        for name, known in self._known:
            if known is condition:
                return name
        for i, (name, known) in enumerate(self._known):
            if _equal(known, condition):
                self._known[i] = (name, condition)
                return name
        name = self._new_name()
        self._known = [*self._known[-MOST_CONDITIONS + 1 :], (name, condition)]
        return name

    def clear(self) -> None:
        """A new run."""
        self._known.clear()
        self._count = 0

    _count = 0

    def _new_name(self) -> str:
        self._count += 1
        return ("cond", "uncond")[self._count - 1] if self._count <= 2 else f"branch{self._count}"


def device_from(name: torch.device | str | None) -> torch.device | None:
    """Where cached tensors are to live; ValueError for what is no device."""
    try:
        return None if name is None else torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"cache_device is {name!r}; expected a device such as cpu or cuda:1.") from error


def shift_of(config: Any) -> Any:
    """The shift of a sampler's noise levels, of its settings; `None` if it has none or finds one for every size."""
    return None if config.get("use_dynamic_shifting") else config.get("flow_shift", config.get("shift"))


def at_sampler(cache: StepCache, args: Any, kwargs: Any, sampler: Any = None) -> tuple[Any, Any]:
    """The arguments of a diffusers `step(model_output, ...)`, with what the cache gives for its first one."""
    if "model_output" in kwargs:
        return args, kwargs | {"model_output": cache.step_over(kwargs["model_output"], sampler)}
    return ((cache.step_over(args[0], sampler), *args[1:]) if args else args), kwargs


def first_tensor(tree: Any) -> torch.Tensor | None:
    """The first tensor in a tree of arguments."""
    return next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)), None)


class TreeEntrance(Entrance):
    """An entrance for any model: its latent and what it returns may be any tree of tensors.

    A list with one latent a sample, an output object, pictures and sound: all is cached as one tensor and given back
    in the shape it had.
    """

    def __init__(self, cache: StepCache, blocks: BlockStack | None = None) -> None:
        super().__init__(cache, blocks)
        self._returns: dict[str, tuple[torch.Tensor, torch.Size, Callable[[torch.Tensor], Any]]] = {}

    def enter(self, original: Method, args: Any, kwargs: Any, latent: Any, branch: str, owner: Hashable = None) -> Any:
        """Call `original(*args, **kwargs)`, or do without; `latent` is the argument that holds the noisy latent."""
        x, _ = pack(latent)
        call = self.cache.enter(branch, x, latent=self.latent(x), owner=owner)
        if self.blocks is not None:
            with self.blocks.during(call):
                result = original(*args, **kwargs)
        elif call.compute:
            before = x.clone()  # a model may write into its input
            result = original(*args, **kwargs)
            self.cache.keep(call, before, self.learn(call, result))
        else:
            if call.branch not in self._returns:  # what the model returns is not known yet: look once
                self.learn(call, original(*args, **kwargs))
            like, shape, unpack = self._returns[call.branch]
            guided = self.cache.strategy.predicts_guided
            result = unpack(self._stand_in(call, like, shape) if guided else self.cache.predict(call, x))
        self.cache.leave(call, x)
        return result

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """The part of the input that is the latent's own."""
        return x

    def learn(self, call: Call, result: Any) -> torch.Tensor:
        """The tensors in what the model returned, as one; how they are packed is remembered for skipped calls."""
        output, unpack = pack(result)
        self._returns[call.branch] = (output.new_empty(0), output.shape, unpack)
        if self.cache.strategy.stand_ins is not None and not call.last:
            self.cache.strategy.stand_ins[call.branch] = output.detach().clone()
        return output

    def _stand_in(self, call: Call, like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Of a method that forecasts the guided output: the last one again, for guidance that remembers outputs."""
        last = (self.cache.strategy.stand_ins or {}).get(call.branch)
        return like.new_ones(shape) if last is None or last.shape != shape else last.clone()


def pack(tree: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """The tensors in `tree` as one (itself, if it is the only one) and the way back; ValueError if there are none."""
    leaves, shape = pytree.tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[i] for i in places]
    if not tensors:
        raise ValueError(f"the model was given or gave {type(tree).__name__} without any tensor; nothing to cache.")
    sizes = [t.shape for t in tensors]
    others = [None if i in places else leaf for i, leaf in enumerate(leaves)]

    def unpack(packed: torch.Tensor) -> Any:
        parts = [packed] if len(sizes) == 1 else packed.split([s.numel() for s in sizes])
        filled = list(others)
        for i, part, size in zip(places, parts, sizes, strict=True):
            filled[i] = part.view(size) if len(sizes) > 1 else part
        return pytree.tree_unflatten(filled, shape)

    return (tensors[0] if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])), unpack


class ForeignBlockStack(BlockStack):
    """A block stack whose model may write into its tokens, or add to them between blocks.

    What the model adds between blocks (the residuals of a ControlNet) it adds again on a skipped call, so it is taken
    out of the cached residual.
    """

    _in_place: bool | None = None  # whether the blocks write into their input; seen on the first call
    _given: torch.Tensor | None = None  # the first block's input itself, which may be written into

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Also: find out, on the first call, whether the blocks write into their input."""
        try:
            with super().during(call):
                yield
                if self._in_place is None and self._given is not None and self.before is not None:
                    self._in_place = not torch.equal(self.before, self._given)
        finally:
            self._given = None

    def evaluate(self, tokens: torch.Tensor, run: Callable[[], Any]) -> Any:
        """Run a block on `tokens`, which may not be those that the last one gave; gives what it returns.

        Raises:
            ValueError: the tokens are no longer of one shape.
        """
        if self.before is None:
            self._given, self.before = tokens, tokens if self._in_place is False else tokens.clone()
        elif self.after is not None and tokens is not self.after:
            if tokens.shape != self.after.shape:
                raise ValueError(
                    "the tokens change their shape between the blocks, so the stack has no residual; use boundary "
                    "output."
                )
            if self.before is self._given:
                self._given = None
            self.before = self.before + (as_float(tokens) - as_float(self.after))
        return super().evaluate(tokens, run)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
