"""The mixing desk's page: over HTTP as any client sees it, and in a browser where there is one."""

from __future__ import annotations

import shutil
import socket
import zipfile

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from persona_lora.cli.playground import build_page
from persona_lora.core.chat import Verdict
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.experiments.mixing_desk import MixingDesk

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1500,1100",
)  # fmt: skip


class LengthJudge:
    name = "length"

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, float(len(each.answer)), "", self.name) for each in exchanges]


@pytest.fixture
def page(chat_model, make_diff, tmp_path):
    diffs = {
        trait: make_diff(chat_model.model, seed=seed, scale=0.3)
        for seed, trait in enumerate(("calm", "loud"))
    }
    desk = MixingDesk(chat_model, diffs, {"calm": LengthJudge})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = build_page(desk, tmp_path / "mixes")
    blocks.queue(default_concurrency_limit=1)
    _, url, _ = blocks.launch(server_port=port, prevent_thread_lock=True, quiet=True)
    yield url
    blocks.close()


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
    with pytest.raises(AppError, match="nothing to export"):
        client.predict(0.0, 0.0, api_name="/export")
    with pytest.raises(AppError, match="name first"):
        client.predict("  ", 0.0, 0.0, api_name="/save")


def test_a_mix_is_saved_loaded_and_exported(page, tmp_path):
    client = Client(page, verbose=False)
    client.predict("my kind", 1.0, -0.5, api_name="/save")
    assert (tmp_path / "mixes" / "my_kind.json").is_file()
    archive = client.predict(1.0, -0.5, api_name="/export")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "adapter")
    assert LoRADiff.load(tmp_path / "adapter").norm() > 0


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
