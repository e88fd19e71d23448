"""Whose references an image may match, and how strictly: set for the calls inside a `with` block."""

import contextlib
import contextvars
from dataclasses import dataclass, replace

from transformers.utils import logging

from .option_checks_backdrop import check_number

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Scope:
    """Of a thread or task. `namespace`: None: it has never opened one."""

    namespace: str | None = None
    bypass: bool = False
    tolerance: float | None = None


_NO_SCOPE = _Scope()


class MatchingScope:
    """Namespace, bypass and tolerance of the calls of each thread and task.

    Args:
        tolerance: of calls without one of their own, grey levels 0-255.

    Raises:
        ValueError: `tolerance` is no number from 0 to 255.
    """

    def __init__(self, tolerance: float):
        check_number("tolerance", tolerance, "grey levels from 0 to 255", 0, 255)
        self._tolerance = tolerance
        self._scope = contextvars.ContextVar("background_matching_scope", default=_NO_SCOPE)
        self._is_shared = False  # a named namespace has been opened

    @property
    def tolerance(self) -> float:
        """Largest staleness that is reused: the matcher's, or that of `scope(tolerance=...)`."""
        given = self._scope.get().tolerance
        return self._tolerance if given is None else given

    @tolerance.setter
    def tolerance(self, tolerance: float) -> None:
        self._tolerance = tolerance

    @property
    def namespace(self) -> str:
        """Namespace of the current scope; references never cross namespaces. "": the one of calls without a scope."""
        return self._scope.get().namespace or ""

    @property
    def bypassed(self) -> bool:
        """True inside `scope(bypass=True)`, and where it cannot be told whose an image is (see `scope`)."""
        scope = self._scope.get()
        if scope.namespace is None and self._is_shared and not scope.bypass:
            logger.warning_once(
                "Background matching is bypassed in a thread or task without a namespace, because named ones are in use. A "
                "new thread does not inherit its starter's scope: open matcher.scope(namespace=...) in it, or start "
                'contextvars.copy_context().run in it; matcher.scope(namespace="") is the namespace without a name.'
            )
            return True
        return scope.bypass

    @contextlib.contextmanager
    def scope(self, namespace: str | None = None, bypass: bool | None = None, tolerance: float | None = None):
        """Sets namespace, bypass and tolerance for the calls made inside a `with` block, of this thread or task only.

        Once a named namespace was opened, an image from a thread or task that never opened any is nobody's: it may belong
        to a tenant whose scope did not reach the thread. It is split without matching, and a warning says so.

        Args:
            namespace: whose references are used and added, "": those without a name; None: as outside the block.
            bypass: True neither uses nor adds references; None: as outside the block.
            tolerance: largest staleness that is reused, grey levels from 0 to 255; None: as outside the block.

        Raises:
            ValueError: `namespace` is no text, `bypass` no bool, or `tolerance` no number from 0 to 255.
        """
        if not isinstance(namespace, str | None):
            raise ValueError(f"namespace is {namespace!r}; wanted text.")
        if not isinstance(bypass, bool | None):
            raise ValueError(f"bypass is {bypass!r}; wanted True or False.")
        if tolerance is not None:
            check_number("tolerance", tolerance, "grey levels from 0 to 255", 0, 255)
        outside = self._scope.get()
        if namespace:
            self._is_shared = True
        self._scope.set(
            _Scope(
                outside.namespace if namespace is None else namespace,
                outside.bypass if bypass is None else bypass,
                outside.tolerance if tolerance is None else tolerance,
            )
        )
        try:
            yield self
        finally:
            # Who has left a namespace knows of namespaces: outside it means the one without a name.
            left = "" if outside.namespace is None and namespace is not None else outside.namespace
            self._scope.set(replace(outside, namespace=left))
