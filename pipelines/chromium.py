"""A headless Chromium for the page tests and for the screenshots of the docs: the installed one, never a download."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoChromiumError(RuntimeError):
    """None of the known browsers is on the PATH."""


def find_chromium() -> str:
    """The browser's path, or :class:`NoChromiumError` that says how to install one."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        raise NoChromiumError(
            f"no Chromium on the PATH (looked for {', '.join(NAMES)}). Install one: sh pipelines/install_chromium.sh"
        )
    return found


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window. Its sandbox does not start for root, who is the only user in many containers."""
    path = find_chromium()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
