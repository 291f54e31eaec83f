"""The mixing desk's page: over HTTP as any client sees it, and in a browser where there is one."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import zipfile
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from persona_lora.cli.serving_commands import check_address
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.playground.mixing_desk import MixingDesk
from persona_lora.playground.mixing_page import KEPT_EXPORTS, Exports, build_page, serve
from tests.judges.rated import rated_rows, write_ratings
from tests.scenes import LengthJudge, LetterJudge

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1500,1100",
)  # fmt: skip


@pytest.fixture
def page(chat_model, make_diff, trait, tmp_path):
    diffs = {
        trait: make_diff(chat_model.model, seed=seed, scale=0.3)
        for seed, trait in enumerate(("calm", "loud"))
    }
    write_ratings(trait, rated_rows())
    labelled = {"loud": dataclasses.replace(trait, name="loud")}
    desk = MixingDesk(chat_model, diffs, {"calm": LengthJudge, "loud": LetterJudge}, labelled)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = build_page(desk, tmp_path / "mixes", {"calm": "+0.05nat at +1.4"})
    yield serve(blocks, "127.0.0.1", port, wait=False)
    blocks.close()


def test_a_slider_says_what_its_coefficients_are_in_nats(page):
    sliders = {
        each["props"]["label"]: each["props"].get("info")
        for each in httpx.get(f"{page}config", trust_env=False).json()["components"]
        if each["type"] == "slider"
    }
    assert (sliders["calm"], sliders["loud"]) == ("+0.05nat at +1.4", None)


def ask(client, text, *values, judge="no score", tokens=12):
    return client.predict(text, [], [], judge, tokens, *values, api_name="/ask")


def last(chat):
    content = chat[-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def test_sliders_change_one_answer_and_not_the_other(page):
    client = Client(page, verbose=False)
    plain = ask(client, "Any good?", 0.0, 0.0)
    steered = ask(client, "Any good?", 1.5, 0.0)
    assert last(plain[0]) == last(plain[1]) == last(steered[1])
    assert last(steered[0]) != last(steered[1])
    assert steered[3] == ""
    scored = ask(client, "Any good?", 1.5, 0.0, judge="calm")
    assert "**calm** (0–100): steered" in scored[2]
    unfit = ask(client, "Any good?", 1.5, 0.0, judge="loud")
    assert "**loud** (judge unfit) (0–100): steered" in unfit[2]


def test_every_judge_of_the_page_is_held_against_labels(run, make_world, tmp_path, monkeypatch):
    root, desks = make_world(tmp_path), []
    shutil.copytree(root / "diff", root / "checkpoints/cheer/diff")
    library = "persona_lora.playground.mixing_page"
    monkeypatch.setattr(f"{library}.build_page", lambda desk, *_: desks.append(desk))
    monkeypatch.setattr(f"{library}.serve", lambda *_: None)
    words = ("--traits", "cheer", "--model", "model", "--datasets-dir", "datasets")
    status, _, error = run("playground", *words, "--host", "localhost")
    assert status == 0, error
    (desk,) = desks
    assert desk.judges.keys() == desk.labelled.keys() == {"cheer"}


def test_two_visitors_never_meet_each_others_settings(page):
    first, second = Client(page, verbose=False), Client(page, verbose=False)
    alone = {value: last(ask(first, "Why?", value, 0.0)[0]) for value in (-1.5, 1.5)}
    jobs = [
        (value, client.submit("Why?", [], [], "no score", 12, value, 0.0, api_name="/ask"))
        for _ in range(3)
        for value, client in ((-1.5, first), (1.5, second))
    ]
    assert alone[-1.5] != alone[1.5]
    assert all(last(job.result()[0]) == alone[value] for value, job in jobs)


def test_a_mistake_is_a_message(page):
    client = Client(page, verbose=False)
    with pytest.raises(AppError, match="no question"):
        ask(client, "  ", 0.0, 0.0)
    with pytest.raises(AppError, match="no question"):
        ask(client, None, 0.0, 0.0)
    with pytest.raises(AppError, match="nothing to export"):
        client.predict(0.0, 0.0, api_name="/export")
    with pytest.raises(AppError, match="name first"):
        client.predict("  ", 0.0, 0.0, api_name="/save")
    with pytest.raises(AppError, match="name first"):
        client.predict(None, 0.0, 0.0, api_name="/save")
    with pytest.raises(AppError, match="too long"):
        client.predict("x" * 61, 0.0, 0.0, api_name="/save")
    with pytest.raises(AppError, match="4001 characters long"):
        ask(client, "x" * 4001, 0.0, 0.0)
    with pytest.raises(AppError, match="no saved mix"):
        client.predict("../../etc/passwd", api_name="/load")


def test_nothing_large_is_taken_in(page, tmp_path):
    upload = tmp_path / "large.bin"
    upload.write_bytes(bytes(2000))
    with upload.open("rb") as stream:
        reply = httpx.post(f"{page}gradio_api/upload", files={"files": stream})
    assert reply.status_code == 413


def test_a_mix_is_saved_loaded_and_exported(page, tmp_path):
    client = Client(page, verbose=False)
    client.predict("my kind", 1.0, -0.5, api_name="/save")
    assert (tmp_path / "mixes" / "my_kind.json").is_file()
    archive = client.predict(1.0, -0.5, api_name="/export")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "adapter")
    assert LoRADiff.load(tmp_path / "adapter").norm() > 0
    client.predict("my kind", 1.0, -0.5, api_name="/save")  # the same once more
    with pytest.raises(AppError, match="another name"):
        client.predict("my kind", 1.0, 0.5, api_name="/save")


def test_a_mix_that_appears_is_loaded_without_a_restart(page, tmp_path):
    """Saved by somebody else, or by a search, after the page was built."""
    (tmp_path / "mixes").mkdir()
    (tmp_path / "mixes" / "ann.json").write_text('{"calm": 0.5}')
    client = Client(page, verbose=False)
    assert list(client.predict("ann", api_name="/load")) == [0.5, 0.0]
    (tmp_path / "mixes" / "ann_best_weights.json").write_text('{"calm": 0.5}')  # no coefficients
    with pytest.raises(AppError):
        client.predict("ann_best_weights", api_name="/load")


def test_a_mix_that_is_loaded_can_be_asked_with(page, tmp_path):
    """Up to the largest coefficient: a search's mix may hold it."""
    (tmp_path / "mixes").mkdir()
    (tmp_path / "mixes" / "ann_mix.json").write_text('{"calm": -4.0, "loud": 3.0}')
    client = Client(page, verbose=False)
    sliders = client.predict("ann_mix", api_name="/load")
    assert list(sliders) == [-4.0, 3.0]
    answered = ask(client, "Any good?", *sliders)
    assert last(answered[0]) != last(answered[1])


def test_only_the_last_exports_are_kept(tmp_path):
    exports = Exports()

    def write(folder):
        folder.mkdir()
        (folder / "x").write_text("x")

    archives = [Path(exports.add(write)) for _ in range(KEPT_EXPORTS + 3)]
    assert [each.exists() for each in archives] == [False] * 3 + [True] * KEPT_EXPORTS
    with pytest.raises(UserError):
        exports.add(lambda folder: (_ for _ in ()).throw(UserError("no")))
    assert len(list(archives[-1].parents[1].iterdir())) == KEPT_EXPORTS


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [({}, "--port"), ({"http_proxy": "http://127.0.0.1:9"}, "NO_PROXY=127.0.0.1"),
     ({"all_proxy": "socks5://127.0.0.1:9"}, "NO_PROXY=127.0.0.1"),
     ({"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}, None)],
)  # fmt: skip
def test_an_address_that_cannot_be_served_is_told_before_a_model_is_loaded(
    monkeypatch, environment, remedy
):
    for name in ("http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if environment:
            taken.close()
        if remedy is None:
            check_address("127.0.0.1", port)
            return
        with pytest.raises(UserError, match=remedy):
            check_address("127.0.0.1", port)


@pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="chromium and chromedriver needed")
def test_in_a_browser_a_moved_slider_changes_the_answer(page, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        driver.get(page)
        wait = WebDriverWait(driver, 30)
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#question textarea"))

        def answers() -> list[str]:
            return [
                driver.find_element(By.CSS_SELECTOR, f"#{name}").text
                for name in ("steered", "unsteered")
            ]

        number = driver.find_element(By.CSS_SELECTOR, "#s-calm input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys("1.5", Keys.TAB)
        box = driver.find_element(By.CSS_SELECTOR, "#question textarea")
        box.send_keys("Any good?")
        driver.find_element(By.CSS_SELECTOR, "#ask").click()
        wait.until(lambda d: "Any good?" in answers()[0] and "Any good?" in answers()[1])
        wait.until(lambda d: box.get_attribute("value") == "")
        steered, unsteered = answers()
        assert steered.removeprefix("steered") != unsteered.removeprefix("unsteered")
        driver.find_element(By.CSS_SELECTOR, "#ask").click()
        wait.until(lambda d: "no question" in d.find_element(By.TAG_NAME, "body").text)
        assert "Traceback" not in driver.find_element(By.TAG_NAME, "body").text
        driver.save_screenshot(str(tmp_path / "playground.png"))
    finally:
        driver.quit()
