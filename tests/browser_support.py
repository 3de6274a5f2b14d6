"""Whether there is a browser to test the web page in."""

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")
ABSENT = f"No Chromium found (looked for {', '.join(NAMES)}); install one: apt-get install -y chromium"


def find() -> str | None:
    """Returns the path of a Chromium or Google Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def left_out() -> bool:
    """Whether tests in a browser are left out: without one, unless UNIFUSION_TEST_BROWSER=required."""
    return find() is None and os.environ.get("UNIFUSION_TEST_BROWSER") != "required"
