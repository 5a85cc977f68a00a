"""How fast this process trains, and how long what is left will take."""

from __future__ import annotations

from time import monotonic


class Pace:
    """Times training steps, and validations apart from them; nothing of it is saved."""

    def __init__(self) -> None:
        self._since = monotonic()
        self._seconds = 0.0
        self._images = 0
        self._steps = 0
        self._validation_seconds = 0.0

    def start(self) -> None:
        """Begin timing: what happened since the last step was no training."""
        self._since = monotonic()

    def step_done(self, images: int) -> float:
        """Count a step of ``images`` and return its seconds."""
        now = monotonic()
        seconds = now - self._since
        self._since = now
        self._seconds += seconds
        self._images += images
        self._steps += 1
        return seconds

    def validation_done(self) -> None:
        """Take the time since :meth:`start` for that of one validation."""
        self._validation_seconds = monotonic() - self._since

    def images_per_second(self) -> float:
        """Return the images trained on per second, waiting for the data included."""
        return self._images / self._seconds if self._seconds > 0 else 0.0

    def eta_seconds(self, steps_left: int, validations_left: int) -> float:
        """Return the seconds that the rest of the run will take at this pace."""
        per_step = self._seconds / self._steps if self._steps else 0.0
        return steps_left * per_step + validations_left * self._validation_seconds
