"""Replace methods of one object, never of its class, and put back the very objects that were there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from stepcache.cache import Call, StepCache


class Patches:
    """Instance attributes set by us, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self.active = True

    def set(self, target: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `make(original)` in place of `target.name`; it passes calls through once `restore` has run."""
        original = getattr(target, name)
        replaced = make(original)

        def method(*args: Any, **kwargs: Any) -> Any:
            return replaced(*args, **kwargs) if self.active else original(*args, **kwargs)

        self._undo.append((target, name, vars(target).get(name, _ABSENT), method))
        setattr(target, name, method)

    def restore(self) -> None:
        """Put everything back; where someone has wrapped our method since, ours stays as a plain passage."""
        self.active = False
        for target, name, before, ours in reversed(self._undo):
            if vars(target).get(name) is not ours:
                continue
            if before is _ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, before)
        self._undo.clear()


_ABSENT = object()


class BlockStack:
    """Reuse of a block stack's residual, by the instance `forward` of its blocks; the container stays untouched.

    Blocks take the tokens as their first argument and return them. While `call` is set and says reuse, the first
    block adds the cached residual and the others pass the tokens through.
    """

    def __init__(self, cache: StepCache, blocks: list[torch.nn.Module], patches: Patches) -> None:
        self.cache = cache
        self.call: Call | None = None
        self._tokens: torch.Tensor | None = None
        for i, block in enumerate(blocks):
            patches.set(block, "forward", partial(self._wrap, index=i, last=len(blocks) - 1))

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """The transformer's call that the blocks are about to be part of."""
        self.call = call
        try:
            yield
        finally:
            self.call = self._tokens = None

    def _wrap(self, original: Callable[..., Any], index: int, last: int) -> Callable[..., Any]:
        def forward(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            call = self.call
            if call is None:
                return original(tokens, *args, **kwargs)
            if not call.compute:
                return self.cache.predict(call, tokens) if index == 0 else tokens
            if index == 0:
                self._tokens = tokens
            output = original(tokens, *args, **kwargs)
            if index == last and self._tokens is not None:
                self.cache.keep(call, self._tokens, output)
                self._tokens = None
            return output

        return forward
