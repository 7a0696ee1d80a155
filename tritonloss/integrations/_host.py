"""Attributes of another library, exchanged for ours and put back as they were."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

_ABSENT = object()


class Place(NamedTuple):
    """What is exchanged: a name in a module, with dots for what a class or a dict there holds."""

    module: str
    name: str
    make: Callable  # the host's own -> ours; of what is new, nothing -> ours
    new: bool = False  # an entry that the host does not have

    def __str__(self) -> str:
        last = self.module.rpartition(".")[2]
        return self.name if "." in self.name else f"{last}.{self.name}"

    def owner(self):
        """Where the name is set: a module, a class or a dict."""
        found = importlib.import_module(self.module)
        for step in self.name.split(".")[:-1]:
            found = _held(found, step)
        return found

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]


def _held(owner, key: str):
    """What is found under a name, an inherited one included."""
    try:
        return owner[key] if isinstance(owner, Mapping) else getattr(owner, key)
    except KeyError as error:
        raise AttributeError(f"no {key}") from error


def _own(owner, key: str):
    """What the owner itself holds, as it is stored there."""
    return (owner if isinstance(owner, Mapping) else vars(owner)).get(key, _ABSENT)


def _set(owner, key: str, value) -> None:
    if isinstance(owner, Mapping):
        if value is _ABSENT:
            del owner[key]
        else:
            owner[key] = value
    elif value is _ABSENT:
        delattr(owner, key)
    else:
        setattr(owner, key, value)


class Host:
    """A library whose losses can be exchanged: for the process, or for a ``with`` block."""

    def __init__(self, library: str, known: str, places: Callable[[], list[Place]]):
        self.library, self.known, self._places = library, known, places
        self._lock = threading.RLock()
        self._originals: list[tuple] = []  # (owner, key, what the owner held)

    def install(self) -> list[str]:
        """Exchange the host's losses for ours, in the whole process; a second call changes nothing.

        Returns:
            What is ours now, as ``"RTDetrLoss.loss_boxes"`` or ``"fcos.sigmoid_focal_loss"``.

        Raises:
            ImportError: the host is absent, or this version of it lacks something that would be
                exchanged; then nothing is.
        """
        with self._lock:
            places = self._places()
            if not self._originals:
                found = [(*self._find(place), place) for place in places]
                for owner, ours, place in found:
                    self._originals.append((owner, place.key, _own(owner, place.key)))
                    _set(owner, place.key, ours)
            return [str(place) for place in places]

    def _find(self, place: Place) -> tuple:
        try:
            owner = place.owner()
            return owner, place.make() if place.new else place.make(_held(owner, place.key))
        except (ImportError, AttributeError, RuntimeError) as error:
            raise ImportError(self._lacking(place, error)) from error

    def _lacking(self, place: Place, error: Exception) -> str:
        try:
            version = importlib.import_module(self.library).__version__
        except (ImportError, AttributeError, RuntimeError) as error:
            return f"{self.library} cannot be imported ({error}): pip install {self.library}"
        return (
            f"{self.library} {version} has no usable {place.module}.{place.name} ({error}); "
            f"known to have it: {self.known}"
        )

    def uninstall(self) -> None:
        """Put back what was there before; without an installation nothing happens."""
        with self._lock:
            for owner, key, original in reversed(self._originals):
                _set(owner, key, original)
            self._originals.clear()

    @contextmanager
    def installed(self) -> Iterator[list[str]]:
        """``install()`` for a ``with`` block; inside another installation it changes nothing."""
        with self._lock:
            outermost = not self._originals
            names = self.install()
        try:
            yield names
        finally:
            if outermost:
                self.uninstall()
