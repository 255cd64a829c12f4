"""How it is said that something could not be measured, or is to be doubted."""

from __future__ import annotations

import logging
import re
import traceback
import warnings


class MissingMeasureWarning(UserWarning):
    """A measure could not be taken; its record says why, and the training goes on."""


class DoubtfulMeasureWarning(UserWarning):
    """A measure was taken, but may not mean what it seems to; its record says why."""


def warn_missing(
    text: str, stacklevel: int = 1, category: type[UserWarning] = MissingMeasureWarning
) -> None:
    """Warns of something, by the log "nettrace" where the user makes errors of warnings.

    Raised from within a training, such an error would end what was not to be disturbed; who wants
    that asks for it by `on_error="raise"`.
    """
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except category:
        logging.getLogger("nettrace").warning(text)


def told(error: BaseException) -> str:
    """An error as a reason: its type and text; of one without a text, where it was raised."""
    if isinstance(error.__cause__, StopIteration):  # of which a generator makes another error
        error = error.__cause__
    return f"{type(error).__name__}: {str(error) or f'it says no more{place_of(error)}'}"


def place_of(error: BaseException) -> str:
    """Where an error was raised, to follow on what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def regardless_of_numbers(reason: str) -> str:
    """A reason without the numbers in it, which may be others at each step."""
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", reason)
