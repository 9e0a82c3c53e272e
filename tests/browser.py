"""Headless Chromium for the tests of pages; whoever has none skips them with a message."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import zlib
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


def printed(driver, *, backgrounds: bool = False) -> list[str]:
    """The content of each page that the browser prints, as PDF operators.

    Args:
        driver: The browser, with the page open.
        backgrounds: Whether backgrounds are printed that do not ask for it themselves.
    """
    data = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": backgrounds})["data"]
    content = base64.b64decode(data)
    pages = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, flags=re.DOTALL):
        try:
            text = zlib.decompress(stream).decode("latin-1")
        except zlib.error:
            continue
        if re.search(r"\bBT\b", text):
            pages.append(text)
    assert len(pages) == len(re.findall(rb"/Type\s*/Page\b", content))
    return pages


def fills(page: str) -> set[tuple[float, ...]]:
    """Colors (red, green, blue from 0 to 1) that a printed page fills with."""
    return {
        tuple(float(part) for part in color)
        for color in re.findall(r"([\d.]+) ([\d.]+) ([\d.]+) rg", page)
    }


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
