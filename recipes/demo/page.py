"""Makes the picture of the server's page, docs/images/page.png, from a real run on this machine.

    redrafter serve --demo
    python recipes/demo/page.py [URL] [OUTPUT]

Needs playwright and Chromium.  Take it on an idle machine: the picture shows the times of the run.
"""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import sync_playwright

QUESTION = "Write a Python function that counts the vowels in a string."
SIZE = {"width": 1000, "height": 760}


def main(url: str = "http://127.0.0.1:8000/", output: str = "docs/images/page.png") -> None:
    """Asks one question with and without drafter, after a first one that warms up."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(url)
        page.get_by_role("switch", name="Compare").check()
        for _ in range(2):
            if page.locator(".turn").count():
                page.get_by_role("button", name="New chat").click()
            page.get_by_label("Message").fill(QUESTION)
            page.get_by_role("button", name="Send").click()
            page.locator(".verdict").wait_for(timeout=120_000)
        page.screenshot(path=output)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
