"""Enter a module of somebody else's: replace methods of one object, never of its class, and put back what was there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from stepcache.core.cache import StepCache
from stepcache.core.strategy import Call

Method = Callable[..., Any]


_ABSENT = object()
MOST_CONDITIONS = 16
"""Conditioning tensors that are remembered; no guidance has more in one run."""


class Patches:
    """Instance attributes set by us, undone in reverse order."""

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
        ours = _Ours(self, target, name, own.get(name, _ABSENT), original or getattr(target, name), make, copies)
        own[name] = ours
        self._ours.append(ours)

    def enter(self, module: torch.nn.Module, make: Callable[[Method], Method]) -> None:
        """Put `make(original)` around `module(...)`, outside of all that others wrap around its `forward`.

        `nn.Module.__call__` looks for `_compiled_call_impl` on the instance before it goes on to hooks and `forward`.
        Standing there, a skipped call onloads no offloaded weights and enters no compiled graph, and libraries that
        put their own `forward` in and out (accelerate does, after every run) do not undo ours. What is compiled
        must be compiled before.

        Raises:
            ValueError: the module carries a cache already.
        """
        if isinstance(module._compiled_call_impl, _Ours) and module._compiled_call_impl.active:
            raise ValueError(f"this {type(module).__name__} carries a cache already; take that one out first.")
        self.set(module, "_compiled_call_impl", make, module._compiled_call_impl or module._call_impl)

    def overridden(self) -> bool:
        """Whether somebody has put his own call in place of one of ours, as `module.compile()` does."""
        return any(not ours.on_top for ours in self._ours if ours.name == "_compiled_call_impl")

    def restore(self) -> None:
        """Put everything back; where a stranger has wrapped our method since, ours stays as a plain passage."""
        self.active = False
        for ours in reversed(self._ours):
            ours.take_out()
        self._ours.clear()


class _Ours:
    """A method of ours on somebody's object.

    It shows the signature of the one it replaces (pipelines look at it), passes calls through once the patches are
    undone, and does not come along when the object is copied.
    """

    def __init__(
        self,
        patches: Patches,
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
            if self._before is _ABSENT:
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
        return _Ours(self._patches, twin, self.name, _ABSENT, bare, self._copies(twin)) if self._copies else bare

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


def first_tensor(tree: Any) -> torch.Tensor | None:
    """The first tensor in a tree of arguments."""
    return next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)), None)


class Entrance:
    """One call of a transformer: asks the cache, then evaluates or predicts, at the cache's boundary.

    What goes in and comes out may be a tensor or any tree of tensors (a list with one latent a sample, an output
    object, pictures and sound): it is cached as one tensor and given back in the shape it had.
    """

    def __init__(self, cache: StepCache, blocks: BlockStack | None = None) -> None:
        self.cache, self.blocks = cache, blocks
        self._run: Any = None
        self._forget()

    def _forget(self) -> None:
        self.own: torch.Size | None = None
        self._output: torch.Size | None = None
        self._returns: dict[Hashable, tuple[torch.Tensor, torch.Size, Callable[[torch.Tensor], Any]]] = {}

    def latent_is(self, shape: torch.Size) -> None:
        """The latent that the sampler works on has this shape.

        The output may have condition tokens behind it: shapes (batch, tokens, channels). In grids a smaller latent
        means other things (a first frame that is given), so they are left as they are.
        """
        own = self.own
        if own and len(shape) == len(own) == 3 and all(a <= b for a, b in zip(shape, own, strict=True)):
            self.own = shape

    def __call__(
        self, original: Method, args: Any, kwargs: Any, latent: Any, branch: str, owner: Hashable = None
    ) -> Any:
        """Call `original(*args, **kwargs)`, or do without; `latent` is the argument that holds the noisy latent."""
        x, _ = pack(latent)
        if self.cache.run is not self._run:
            self._forget()
        call = self.cache.enter(branch, x, own=self.own, owner=owner)
        self._run = self.cache.run
        if self.blocks is not None:
            with self.blocks.during(call):
                result = original(*args, **kwargs)
        elif call.compute:
            result = self._evaluated(call, x, owner, original, args, kwargs)
        else:
            result = self._predicted(call, x, owner, original, args, kwargs)
        self.cache.leave(call, x)
        return result

    def _evaluated(self, call: Call, x: torch.Tensor, owner: Hashable, original: Method, args: Any, kwargs: Any) -> Any:
        strategy = self.cache.strategy
        if strategy is not None and strategy.relative:
            x = x.clone()  # a model may write into its input
        result = original(*args, **kwargs)
        output = self._learn(x, owner, result)
        if output.shape != self._output:
            self._output = self.own = output.shape
        self.cache.keep(call if call.own else replace(call, own=self.own), x, output)
        return result

    def _predicted(self, call: Call, x: torch.Tensor, owner: Hashable, original: Method, args: Any, kwargs: Any) -> Any:
        strategy, signature = self.cache.strategy, (owner, x.shape, x.dtype)
        if signature not in self._returns:  # what the model returns is not known yet: look once
            self._learn(x, owner, original(*args, **kwargs))
        like, shape, unpack = self._returns[signature]
        if strategy is not None and strategy.predicts_guided:
            return unpack(like.new_ones(shape))  # never looked at: the sampler's door makes the forecast
        return unpack(self.cache.predict(call, x))

    def _learn(self, x: torch.Tensor, owner: Hashable, result: Any) -> torch.Tensor:
        """The tensors in what the model returned, as one; how they are packed is remembered for skipped calls."""
        output, unpack = pack(result)
        self._returns[owner, x.shape, x.dtype] = (output.new_empty(0), output.shape, unpack)
        return output


def pack(tree: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """The tensors in `tree` as one (itself, if it is the only one) and the way back; ValueError if there are none."""
    leaves, shape = pytree.tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ValueError(f"the model was given or gave {type(tree).__name__} without any tensor; nothing to cache.")
    sizes = [t.shape for t in tensors]
    others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def unpack(packed: torch.Tensor) -> Any:
        parts = [packed] if len(sizes) == 1 else packed.split([s.numel() for s in sizes])
        filled = list(others)
        for i, part, size in zip(places, parts, sizes, strict=True):
            filled[i] = part if len(sizes) == 1 else part.view(size)
        return pytree.tree_unflatten(filled, shape)

    return (tensors[0] if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])), unpack


class BlockStack:
    """Reuse of a block stack's residual; every block is entered by itself, the containers stay untouched.

    While a call says skip, the first block that runs adds the cached residual to the tokens and the others pass them
    through. (A model may leave blocks out, as skip-layer guidance does; which one runs first or last is seen, not
    assumed.) What the model adds between blocks (the residuals of a ControlNet) it adds again on a skipped call, so it
    is taken out of the residual.

    Args:
        blocks: in the order in which they run.
        streams: names of the block's arguments that it returns, in the order in which it returns them; a block with
            one stream returns it bare.
        tokens: which of the streams becomes the output.
    """

    def __init__(
        self,
        cache: StepCache,
        blocks: list[torch.nn.Module],
        patches: Patches,
        streams: tuple[str, ...] = ("x",),
        tokens: str | None = None,
    ) -> None:
        self.cache, self.streams = cache, streams
        self.tokens = streams.index(tokens) if tokens else 0
        self.call: Call | None = None
        self._in_place: bool | None = None  # whether the blocks write into their input; seen on the first call
        self._forget()
        for block in blocks:
            names = list(inspect.signature(type(inside(block)).forward).parameters)[1:]
            places = {name: names.index(name) for name in streams if name in names}
            if len(streams) == 1:
                places.setdefault(streams[0], 0)
            elif missing := set(streams) - set(places):
                raise ValueError(f"{type(block).__name__}.forward has no argument {' or '.join(sorted(missing))}.")
            patches.enter(block, functools.partial(self._wrap, places=places))

    def _forget(self) -> None:
        self._before: torch.Tensor | None = None
        self._given: torch.Tensor | None = None  # the first block's input itself, which `_before` may be a copy of
        self._after: torch.Tensor | None = None
        self._added: torch.Tensor | None = None

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """The transformer's call that the blocks are about to be part of."""
        self.call = call
        try:
            yield
            before, after = self._before, self._after
            if before is not None and after is not None:
                if self._in_place is None and self._given is not None:
                    self._in_place = not torch.equal(before, self._given)
                self.cache.keep(call, before if self._added is None else before + self._added, after)
        finally:
            self.call = None
            self._forget()

    def _wrap(self, original: Method, places: dict[str, int]) -> Method:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self.call
            if call is None:
                return original(*args, **kwargs)
            streams = [kwargs[n] if n in kwargs else args[places[n]] for n in self.streams]
            tokens = streams[self.tokens]
            first = self._before is None
            if first:
                self._given = tokens
                self._before = tokens if self._in_place is False or not call.compute else tokens.clone()
            if not call.compute:
                if first:
                    streams[self.tokens] = self.cache.predict(call, tokens)
                return streams[0] if len(streams) == 1 else tuple(streams)
            if not first and tokens is not self._after:
                self._see_addition(tokens)
            result = original(*args, **kwargs)
            self._after = result if len(streams) == 1 else result[self.tokens]
            return result

        return forward

    def _see_addition(self, tokens: torch.Tensor) -> None:
        """The model did something to the tokens between two blocks."""
        if self._after is None or tokens.shape != self._after.shape:
            raise ValueError(
                "the tokens change their shape between the blocks, so the stack has no residual; use boundary output."
            )
        added = tokens.detach().float() - self._after.detach().float()
        self._added = added if self._added is None else self._added + added


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
