"""Headless Chromium for the tests of pages; whoever has none skips them with a message."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-prefers-reduced-motion",
)


def missing() -> str | None:
    """Why there is no browser to test with."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return (
            "no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)"
        )
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium here (pip install selenium)"
    return None


needed = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@contextmanager
def chromium(profile: Path, *, width: int = 1200, height: int = 900):
    """A driver with a fresh profile that logs console and network."""
    from selenium import webdriver

    os.environ.setdefault("SE_OFFLINE", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    try:
        yield driver
    finally:
        driver.quit()


def complaints(driver) -> list[str]:
    """Warnings and errors of the console."""
    return [
        entry["message"]
        for entry in driver.get_log("browser")
        if entry["level"] in ("WARNING", "SEVERE")
    ]


def outside_requests(driver) -> list[str]:
    """Addresses that the page asked for beyond its own file."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if url.startswith(("http:", "https:", "ws:", "wss:", "ftp:"))]
