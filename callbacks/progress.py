"""The trainer's progress bar, which says when a measurement is going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any


@contextmanager
def announced(trainer: Any, text: str) -> Iterator[None]:
    """Shows a text on the trainer's progress bar while something is done, if it has one.

    Lightning's `TQDMProgressBar` and `RichProgressBar` are known, and what is derived of them.
    Before they have a bar for the training, the text has a line of its own. What goes wrong with a
    bar is passed over.

    Args:
        trainer: a Lightning trainer.
        text: a few words.
    """
    restore: Callable[[], Any] = lambda: None  # noqa: E731
    with suppress(Exception):
        bar = trainer.progress_bar_callback
        known = [_SHOW[kind.__name__] for kind in type(bar).__mro__ if kind.__name__ in _SHOW]
        if known and bar.is_enabled:
            restore = known[0](bar, text)
    try:
        yield
    finally:
        with suppress(Exception):
            restore()


def _show_in_tqdm(callback: Any, text: str) -> Callable[[], Any]:
    bar = callback._train_progress_bar
    if bar is None or bar.disable:  # before the first batch
        bar = callback.init_train_tqdm()
        bar.leave = False
        bar.set_description(text)
        return bar.close  # type: ignore[no-any-return]
    before = bar.postfix or ""
    bar.set_postfix_str(f"{before}, {text}" if before else text)
    return lambda: bar.set_postfix_str(before)


def _show_in_rich(callback: Any, text: str) -> Callable[[], Any]:
    if callback.progress is None or callback._progress_stopped:  # before the first batch
        status = import_module("rich").get_console().status(text)
        status.start()
        return status.stop  # type: ignore[no-any-return]
    number = callback.train_progress_bar_id
    if number is None:  # after the sanity check
        number = callback.val_sanity_progress_bar_id
    task = callback.progress.tasks[number]
    before, visible = task.description, task.visible

    def describe(description: str, visible: bool) -> None:
        callback.progress.update(number, description=description, visible=visible)
        callback.refresh()

    describe(text, visible=True)
    return lambda: describe(before, visible)


#: How to show a text by the class of a progress bar; returns what takes it away again.
_SHOW = {"TQDMProgressBar": _show_in_tqdm, "RichProgressBar": _show_in_rich}
