"""How it is said that something could not be measured."""

from __future__ import annotations

import logging
import re
import warnings


class MissingMeasureWarning(UserWarning):
    """A measure could not be taken; its record says why, and the training goes on."""


def warn_missing(text: str, stacklevel: int = 1) -> None:
    """Warns of something missing, by the log "nettrace" where the user makes errors of warnings.

    Raised from within a training, such an error would end what was not to be disturbed; who wants
    that asks for it by `on_error="raise"`.
    """
    try:
        warnings.warn(text, MissingMeasureWarning, stacklevel=stacklevel + 1)
    except MissingMeasureWarning:
        logging.getLogger("nettrace").warning(text)


def regardless_of_numbers(reason: str) -> str:
    """A reason without the numbers in it, which may be others at each step."""
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", reason)
