"""Enter a module of somebody else's: replace methods of one object, never of its class, and put back what was there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from stepcache.cache import Call, StepCache

Method = Callable[..., Any]
_ABSENT = object()


class Patches:
    """Instance attributes set by us, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self.active = True

    def set(self, target: Any, name: str, make: Callable[[Method], Method], original: Method | None = None) -> None:
        """Put `make(original)` in place of `target.name`; it passes calls through once `restore` has run."""
        own = vars(target)  # not getattr and setattr: a compiled module would hand them on to the module inside
        before = own.get(name, _ABSENT)
        original = original or getattr(target, name)
        own[name] = ours = _Ours(self, target, name, original, make(original))
        self._undo.append((target, name, before, ours))

    def enter(self, module: torch.nn.Module, make: Callable[[Method], Method]) -> None:
        """Put `make(original)` around `module(...)`, outside of all that others wrap around its `forward`.

        `nn.Module.__call__` looks for `_compiled_call_impl` on the instance before it goes on to hooks and `forward`.
        Standing there, a skipped call onloads no offloaded weights and enters no compiled graph, and libraries that
        put their own `forward` in and out (accelerate does, after every run) do not undo ours. What is compiled
        must be compiled before.
        """
        self.set(module, "_compiled_call_impl", make, module._compiled_call_impl or module._call_impl)

    def overridden(self) -> bool:
        """Whether somebody has put his own call in place of one of ours, as `module.compile()` does."""
        return any(vars(t).get(n) is not ours for t, n, _, ours in self._undo if n == "_compiled_call_impl")

    def restore(self) -> None:
        """Put everything back; where someone has wrapped our method since, ours stays as a plain passage."""
        self.active = False
        for target, name, before, ours in reversed(self._undo):
            own = vars(target)
            if own.get(name) is not ours:
                continue
            if before is _ABSENT:
                del own[name]
            else:
                own[name] = before
        self._undo.clear()


class _Ours:
    """A method of ours on somebody's object.

    It shows the signature of the one it replaces (pipelines look at it), passes calls through once the patches are
    undone, and does not come along when the object is copied.
    """

    def __init__(self, patches: Patches, target: Any, name: str, original: Method, replaced: Method) -> None:
        functools.update_wrapper(self, original)
        self._patches, self._target, self._name = patches, target, name
        self._original, self._replaced = original, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._replaced if self._patches.active else self._original)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self._target))
        return self if twin is None else getattr(type(twin), self._name).__get__(twin)


class Entrance:
    """One call of a transformer: asks the cache, then evaluates or predicts, at the cache's boundary.

    What goes in and comes out may be a tensor or any tree of tensors (a list with one latent a sample, an output
    object, pictures and sound): it is cached as one tensor and given back in the shape it had.
    """

    def __init__(self, cache: StepCache, blocks: BlockStack | None = None) -> None:
        self.cache, self.blocks = cache, blocks
        self._unpack: dict[str, Callable[[torch.Tensor], Any]] = {}

    def __call__(
        self, original: Method, args: Any, kwargs: Any, latent: Any, key: Hashable, holder: Any, owner: Hashable = None
    ) -> Any:
        """Call `original(*args, **kwargs)`, or do without; `latent` is the argument that holds the noisy latent."""
        x, _ = pack(latent)
        call = self.cache.enter(key, x, holder=holder, owner=owner)
        if self.blocks is not None:
            with self.blocks.during(call):
                result = original(*args, **kwargs)
        elif call.compute:
            result = original(*args, **kwargs)
            output, self._unpack[call.branch] = pack(result)
            self.cache.keep(call, x, output)
        else:
            result = self._unpack[call.branch](self.cache.predict(call, x))
        self.cache.leave(call, x)
        return result


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

    While a call says reuse, the first block that runs adds the cached residual to the tokens and the others pass them
    through. (A model may leave blocks out, as skip-layer guidance does; which one runs first or last is seen, not
    assumed.)

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
        self._before: torch.Tensor | None = None
        self._after: torch.Tensor | None = None
        for block in blocks:
            names = list(inspect.signature(block.forward).parameters)
            places = {name: names.index(name) for name in streams if name in names}
            patches.enter(block, functools.partial(self._wrap, places=places))

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """The transformer's call that the blocks are about to be part of."""
        self.call = call
        try:
            yield
            if self._before is not None and self._after is not None:
                self.cache.keep(call, self._before, self._after)
        finally:
            self.call = self._before = self._after = None

    def _wrap(self, original: Method, places: dict[str, int]) -> Method:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self.call
            if call is None:
                return original(*args, **kwargs)
            streams = [kwargs[n] if n in kwargs else args[places.get(n, 0)] for n in self.streams]
            first = self._before is None
            if first:
                self._before = streams[self.tokens]
            if not call.compute:
                if first:
                    streams[self.tokens] = self.cache.predict(call, streams[self.tokens])
                return streams[0] if len(streams) == 1 else tuple(streams)
            result = original(*args, **kwargs)
            self._after = result if len(streams) == 1 else result[self.tokens]
            return result

        return forward
