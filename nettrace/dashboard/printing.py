"""Pages as PDF or PNG, by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OPTIONS = (
    *("--headless=new", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--no-sandbox"),
    "--virtual-time-budget=60000",
)
#: Seconds that a browser may take.
_PATIENCE = 180
_WIDTH, _HIGHEST = 1280, 16_000


def printed(page: str, output: Path, form: str) -> None:
    """Prints a page with all its figures.

    Args:
        page: HTML that draws all figures where its address ends in #all, and then says how high it
            is by the attribute data-height.
        output: the file to write.
        form: "pdf" or "png", of which the latter ends after 16,000 pixels.

    Raises:
        OSError: if there is no browser, or it fails.
    """
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        raise OSError(
            f"a report as {form} is printed by Chromium or Chrome, and none of "
            f"{', '.join(_BROWSERS)} is on PATH: install one, or write html"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "page.html"
        source.write_text(page, encoding="utf-8")
        target = Path(folder) / f"page.{form}"
        common = [found, *_OPTIONS, f"--user-data-dir={folder}/profile"]
        address = source.as_uri() + "#all"
        if form == "pdf":
            options = [f"--print-to-pdf={target}", "--no-pdf-header-footer"]
        else:
            size = f"--window-size={_WIDTH},1000"
            text = _run([*common, size, "--dump-dom", address])
            height = re.search(r'data-height="(\d+)"', text)
            high = min(int(height[1]) if height else 4000, _HIGHEST)
            options = [f"--window-size={_WIDTH},{high}", f"--screenshot={target}"]
        _run([*common, *options, address])
        if not target.exists():
            raise OSError(f"{found} wrote no {form}")
        shutil.copyfile(target, output)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took longer than {_PATIENCE} s") from error
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout
