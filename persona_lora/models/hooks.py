"""The owner of forward hooks: puts them on modules, and takes them off on any exit.

Knows that a hook may be left behind or never run; refuses to know what a hook does.

However a block is left, at whatever instruction it is interrupted: a ``with`` statement calls
``__exit__`` only when ``__enter__`` has returned, and both are functions with a first and a last
instruction at which an interrupt leaves the change behind. So a change is made by a generator that
stands inside its own ``try`` while the block runs, and it is started and closed from outside Python
code of ours: by the interpreter and by ``contextlib.closing``.
"""

from __future__ import annotations

import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from persona_lora.core.errors import UserError
from persona_lora.models.structure import check_model, kind_of


class _Enter:
    """The ``__enter__`` that is the first step of the generator itself."""

    def __get__(self, instance: Reversible | None, owner: type[Reversible]) -> Callable[..., Any]:
        return methodcaller("__enter__") if instance is None else instance._begun().__next__


class Reversible(closing[Any], ABC):
    """Context manager: ``apply`` on entry, ``undo`` on any exit, also from a failing ``apply``.

    One that is dropped inside its block undoes itself when it is collected. Raises UserError where
    it is entered inside itself.
    """

    thing: Generator[Self] | None

    if TYPE_CHECKING:

        def __enter__(self) -> Self: ...
    else:
        __enter__ = _Enter()

    def __init__(self) -> None:
        super().__init__(None)  # the generator of the block that runs, or of the last one

    @abstractmethod
    def apply(self) -> None:
        """Make the change."""

    @abstractmethod
    def undo(self) -> None:
        """Take back what was changed: all, a part or nothing of it; safe to call again."""

    def _begun(self) -> Generator[Self]:
        if self.thing and inspect.getgeneratorstate(self.thing) == inspect.GEN_SUSPENDED:
            raise UserError(
                f"this {type(self).__name__} is in use already; make another one to nest them"
            )
        self.thing = self._changed()
        return self.thing

    def _changed(self) -> Generator[Self]:
        try:
            try:
                self.apply()
                yield self
            except BaseException:
                self.undo()
                raise
        except BaseException:
            self.undo()  # the first may have been interrupted
            raise


class Hook(NamedTuple):
    """What to call at a module: after its forward pass, or before it with all its arguments.

    As in torch, what it returns takes the place of the output, or of the arguments; None does not.
    ``first`` puts it before the hooks that the module has. ``name`` is what errors call the module.
    """

    module: nn.Module
    call: Callable[..., Any]
    name: str
    before: bool = False
    first: bool = False


class Hooked(Reversible):
    """Context manager: its hooks are on their modules inside the block, and nowhere after it.

    With ``model`` a whole pass of it in which no hook of a kind ran (modules of one last name, as
    experts are; with ``every``: in which one did not) is a UserError: steering that touches nothing
    looks like steering that does nothing.
    """

    def __init__(
        self, hooks: Sequence[Hook] = (), *, model: nn.Module | None = None, every: bool = False
    ) -> None:
        super().__init__()
        self._given = hooks
        self._watched = [] if model is None else _outermost(model)
        self._every = every
        self._guards: list[_Guard] = []
        self._handles: list[RemovableHandle] = []

    def hooks(self) -> Sequence[Hook]:
        """Return the hooks to put, at each entry: those that were given."""
        return self._given

    def apply(self) -> None:
        """Put the hooks."""
        self._guards = [_Guard(hook) for hook in self.hooks()]
        watched = self._watched if self._guards else []
        watch = [_Guard(Hook(each, self._after_pass, "the model")) for each in watched]
        # In one call: nothing can come between a hook and the note of how it comes off again.
        both = (*self._guards, *watch)
        self._handles.extend(map(operator.call, map(_Guard.registration, both)))

    def undo(self) -> None:
        """Take the hooks off."""
        for guard in self._guards:
            guard.open = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._guards.clear()

    def _after_pass(self, module: nn.Module, arguments: object, output: object) -> None:
        steering = [guard for guard in self._guards if not guard.hook.before]
        ran = {kind_of(guard.hook.name) for guard in steering if guard.fired}
        missing = [
            guard.hook.name
            for guard in steering
            if not guard.fired and (self._every or kind_of(guard.hook.name) not in ran)
        ]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(steering)} modules to steer did not run in a whole"
                f" pass of this {type(module).__name__} ({', '.join(missing[:3])}); steering them "
                "would change nothing: choose what takes part, or merge the diff (--mode merged)"
            )


def _outermost(model: nn.Module) -> list[nn.Module]:
    """Return the model and, where it is wrapped, the transformer inside: calls pass by either."""
    check_model(model)
    inner = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), model)
    return [model] if inner is model else [model, inner]


class _Guard:
    """A hook that notes that it ran, and does nothing once its block is left."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.open = True
        self.fired = False

    def __call__(self, *arguments: Any) -> Any:
        if not self.open:
            return None
        self.fired = True
        return self.hook.call(*arguments)

    def registration(self) -> Callable[[], RemovableHandle]:
        """Return the call that puts the hook."""
        module, first = self.hook.module, self.hook.first
        if self.hook.before:
            return partial(module.register_forward_pre_hook, self, prepend=first, with_kwargs=True)
        return partial(module.register_forward_hook, self, prepend=first)
