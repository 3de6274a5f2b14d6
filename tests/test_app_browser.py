"""The web page in a real browser: headless Chromium, with the server in this process."""

import shutil
import uuid

import numpy as np
import PIL.Image
import pytest
from pipeline_support import shaken_model
from playwright.sync_api import expect, sync_playwright

from unifusion_jax import Prompt, images, web

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LIMITS = web.Limits(pictures=2, picture_mb=1, side_px=128, steps=4000, waiting=1)
WAIT_MS = 300_000
HOW = {"steps": 2, "guidance": 2.0, "size": 64}


@pytest.fixture(scope="module")
def model(frozen):
    return shaken_model(frozen)


@pytest.fixture(scope="module")
def browser():
    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    if not found:
        pytest.fail(f"No Chromium found (looked for {', '.join(CHROMIUM)}); install one: apt-get install -y chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    blocks = web.serve(model, tmp_path_factory.mktemp("pictures"), LIMITS, wait=False)
    yield blocks.local_url
    blocks.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page as another user at each call; afterwards checks that nothing came from elsewhere and no script failed."""
    contexts, elsewhere, failed = [], [], []

    def opened():
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: elsewhere.append(request.url) if outside(request.url) else None)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(server)
        page.locator("#draw").wait_for()
        return page

    def outside(url):
        return not url.startswith((server, "data:", "blob:"))

    yield opened
    for context in contexts:
        context.close()
    assert (elsewhere, failed) == ([], [])


def ask(page, prompt, *, description="", seed=0, steps=2):
    """Fills the form in and presses "Draw"."""
    page.fill("#prompt textarea", prompt)
    if description:
        page.fill("#description textarea", description)
        page.check("#keep input")
    for name, value in {"seed": seed, "steps": steps, "guidance": 2}.items():
        page.fill(f"#{name} input[type=number]", str(value))
    page.get_by_text("More settings", exact=True).click()
    page.fill("#size input, #size textarea", "64")
    page.click("#draw")


def says(page, words):
    expect(page.locator("#progress")).to_contain_text(words, timeout=WAIT_MS)


def toast(page, words):
    expect(page.get_by_test_id("toast-body").filter(has_text=words)).to_be_visible(timeout=WAIT_MS)


def drawn(page, folder):
    """Waits until all is drawn; returns the first picture's file, as the browser got it."""
    says(page, "done")
    source = page.locator("#gallery img").first.get_attribute("src")
    file = folder / f"{uuid.uuid4()}.png"
    file.write_bytes(page.request.get(source).body())
    return file


def same(file, image):
    return np.abs(np.asarray(PIL.Image.open(file)).astype(int) - np.asarray(image)).max() <= 1


def test_draws_shows_what_it_wrote_and_draws_that_again(model, visit, tmp_path):
    page = visit()
    ask(page, "a ring", seed=3)
    file = drawn(page, tmp_path)
    assert same(file, model.generate(["a ring"], seed=3, **HOW)[0])
    text = model.condition(["a ring"]).texts[0]
    assert page.input_value("#description textarea") == text
    settings = images.read_settings(file)
    assert (settings["prompt"], settings["seed"], settings["target"]) == ("a ring", 3, text)
    # Its words changed, the description is drawn as the user wants it.
    page.fill("#description textarea", "A blue star.")
    page.check("#keep input")
    page.click("#draw")
    says(page, "reading the prompt")
    again = drawn(page, tmp_path)
    assert same(again, model.generate([Prompt("a ring", target="A blue star.")], seed=3, **HOW)[0])
    assert page.input_value("#description textarea") == "A blue star."


def test_edits_an_uploaded_picture(model, visit, tmp_path):
    PIL.Image.new("RGB", (96, 80), "red").save(tmp_path / "red.png")
    page = visit()
    page.set_input_files("#pictures input[type=file]", tmp_path / "red.png")
    expect(page.locator("#seen img").first).to_be_visible()
    ask(page, "make it blue", description="A blue star.")
    file = drawn(page, tmp_path)
    reference = Prompt("make it blue", [images.load(tmp_path / "red.png")], target="A blue star.")
    assert same(file, model.generate([reference], **HOW)[0])


def test_a_bad_upload_is_told_and_the_page_goes_on(visit, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "huge.png").write_bytes(bytes((LIMITS.picture_mb << 20) + 1))
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "fine.png")
    page = visit()
    page.set_input_files("#pictures input[type=file]", tmp_path / "huge.png")
    toast(page, "exceed the maximum allowed size")
    page.set_input_files("#pictures input[type=file]", tmp_path / "text.png")
    toast(page, "text.png cannot be used: not an image")
    ask(page, "make it blue", description="A blue star.")
    says(page, "nothing was drawn")
    assert page.locator("#gallery img").count() == 0
    page.locator("#pictures").get_by_label("Clear").last.click()
    page.set_input_files("#pictures input[type=file]", tmp_path / "fine.png")
    page.click("#draw")
    drawn(page, tmp_path)


def test_two_users_at_once_get_each_their_own(model, visit, tmp_path):
    first, second = visit(), visit()
    ask(first, "x", description="A red circle.", seed=5, steps=1000)
    says(first, "drawing")
    ask(second, "x", description="A blue star.", seed=9)
    expect(second.locator("#gallery")).to_contain_text("queue")
    for page, description, seed, steps in ((first, "A red circle.", 5, 1000), (second, "A blue star.", 9, 2)):
        expected = model.generate([Prompt("x", target=description)], seed=seed, **HOW | {"steps": steps})
        assert same(drawn(page, tmp_path), expected[0])
        assert page.input_value("#description textarea") == description


def test_cancelling_while_it_is_drawn_makes_way_for_who_waits(visit, tmp_path):
    first, second, third = visit(), visit(), visit()
    ask(first, "x", description="A red circle.", steps=LIMITS.steps)
    says(first, f"drawing: step {LIMITS.steps // 20} of {LIMITS.steps}")
    ask(second, "x", description="A blue star.")
    expect(second.locator("#gallery")).to_contain_text("queue")
    ask(third, "x", description="A blue star.")
    toast(third, "Queue is full")
    first.click("#cancel")
    says(first, "cancelled")
    drawn(second, tmp_path)
    expect(first.locator("#progress")).to_contain_text("cancelled")
    assert first.locator("#gallery img").count() == 0
