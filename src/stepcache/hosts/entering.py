"""Enter a foreign module: one call of a transformer, or the blocks of its stack one by one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stepcache.core.cache import StepCache
from stepcache.core.strategy import Call
from stepcache.core.tensors import as_float

Method = Callable[..., Any]
ABSENT = object()


class DoesNotFit(ValueError):
    """The policy cannot do this run; upstream's own errors are others."""


class Patches:
    """Attributes of objects (never of their classes) set by us, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, target: Any, name: str, make: Callable[[Method], Method], original: Method | None = None) -> None:
        """Put `make(original)` in place of `target.name`, until `restore`."""
        own, original = vars(target), original or getattr(target, name)
        self._undo.append((own, name, own.get(name, ABSENT)))
        own[name] = functools.update_wrapper(make(original), original)

    def enter(self, module: torch.nn.Module, make: Callable[[Method], Method]) -> None:
        """Put `make(original)` around `module(...)`, outside of all that others wrap around its `forward`.

        `nn.Module.__call__` looks for `_compiled_call_impl` on the instance before it goes on to hooks and `forward`.
        Standing there, a skipped call onloads no offloaded weights, gathers no shards and enters no compiled graph.
        """
        self.set(module, "_compiled_call_impl", make, module._compiled_call_impl or module._call_impl)

    def restore(self) -> None:
        """Put back the very objects that were there."""
        for own, name, before in reversed(self._undo):
            if before is ABSENT:
                own.pop(name, None)
            else:
                own[name] = before
        self._undo.clear()


class Entrance:
    """One call of a transformer that returns a list or tuple of one tensor: evaluated, or predicted."""

    def __init__(self, cache: StepCache, blocks: BlockStack | None = None) -> None:
        self.cache, self.blocks = cache, blocks
        self._shapes: dict[str, torch.Tensor] = {}  # branch -> a tensor of its outputs' shape, which holds no memory

    def __call__(
        self, original: Method, args: Any, kwargs: Any, x: torch.Tensor, branch: str, owner: str | None = None
    ) -> Any:
        """Call `original(*args, **kwargs)`, or do without; `x` is the noisy latent among the arguments.

        `owner`: which transformer it is, where the steps are divided among several.
        """
        call = self.cache.enter(branch, x, owner=owner)
        if self.blocks is not None:
            with self.blocks.during(call):
                result = original(*args, **kwargs)
        elif call.compute:
            result = original(*args, **kwargs)
            self._shapes[call.branch] = result[0].new_empty(()).expand(result[0].shape)
            self.cache.keep(call, x, result[0])
        elif self.cache.strategy.predicts_guided:  # the sampler step makes the forecast: anything of this shape
            result = [torch.ones_like(self._shapes[call.branch], memory_format=torch.contiguous_format)]
        else:
            result = [self.cache.predict(call, x)]
        self.cache.leave(call, x)
        return result


class BlockStack:
    """Reuse of a block stack's residual; every block is entered by itself, the containers stay untouched.

    While a call says skip, the first block that runs adds the cached residual to the tokens and the others pass them
    through. (A model may leave blocks out, as skip-layer guidance does; which one runs first or last is seen, not
    assumed.)

    Args:
        blocks: in the order in which they run.
        streams: names of the block's arguments that it returns, in the order in which it returns them; a block with
            one stream returns it bare.
        tokens: which of the streams becomes the output.
    """

    def __init__(
        self, cache: StepCache, blocks: list[torch.nn.Module], patches: Any,
        streams: tuple[str, ...] = ("x",), tokens: int = 0,
    ) -> None:  # fmt: skip
        self.cache, self.streams, self.tokens = cache, streams, tokens
        self.call: Call | None = None
        self.before: torch.Tensor | None = None  # the tokens before the first block of this call, and
        self.after: torch.Tensor | None = None  # after the last one that was evaluated
        self._dtype: torch.dtype | None = None  # of the tokens after the stack
        for block in blocks:
            names = list(inspect.signature(type(block).forward).parameters)[1:]
            places = {name: names.index(name) if name in names else 0 for name in streams}
            patches.enter(block, functools.partial(self._wrap, places=places))

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """The transformer's call that the blocks are about to be part of."""
        self.call = call
        try:
            yield
            if self.before is not None and self.after is not None:
                self._dtype = self.after.dtype
                self.cache.keep(call, self.before, as_float(self.after) - as_float(self.before))
        finally:
            self.call = self.before = self.after = None

    def evaluate(self, tokens: torch.Tensor, run: Callable[[], Any]) -> Any:
        """Run a block on `tokens`; gives what it returns."""
        self.before = tokens if self.before is None else self.before
        result = run()
        self.after = result if len(self.streams) == 1 else result[self.tokens]
        return result

    def _wrap(self, original: Method, places: dict[str, int]) -> Method:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.call is None:
                return original(*args, **kwargs)
            streams = [kwargs[n] if n in kwargs else args[places[n]] for n in self.streams]
            tokens = streams[self.tokens]
            if self.call.compute:
                return self.evaluate(tokens, lambda: original(*args, **kwargs))
            if self.before is None:
                self.before = tokens
                streams[self.tokens] = (tokens + self.cache.predict(self.call, tokens)).to(self._dtype or tokens.dtype)
            return streams[0] if len(streams) == 1 else tuple(streams)

        return forward
