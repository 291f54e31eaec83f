"""What a hub gets: what opens with PEFT, a card, no path of this machine; and only when asked."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel
from typer.testing import CliRunner

from persona_lora import cli
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.strength import Moved, Strengths
from persona_lora.steering.export import export_peft
from persona_lora.studies.publishing import PACKAGED_ON_HUB, hub_id, push, write_publication

HERE = "/srv/somebody/secret-project"
TRAINING = {
    "model": HERE,
    "num_pairs": 7,
    "training": {
        "num_train_epochs": 2.0,
        "learning_rate": 0.0002,
        "deepspeed": f"{HERE}/zero3.json",
    },
    "template": {"system_prompt": "/no_think", "file": f"{HERE}/chat.jinja"},
}


@pytest.fixture
def direction(tmp_path, model, make_diff):
    """A diff that was trained on a folder of this machine, with strengths beside it."""
    sources = {"training": TRAINING, "seed": 3, "pos": f"{HERE}/pos", "neg": f"{HERE}/neg"}
    diff = replace(make_diff(model), trait="evil", sources=sources)
    diff = replace(diff, base_model=BaseModel(HERE, diff.base_model.fingerprint))
    points = (Moved(-1.0, 0.2, 0.3), Moved(1.0, 0.2, 0.3))
    Strengths(diff.content(), "", "p", points).save(tmp_path / "diff")
    return diff.save(tmp_path / "diff")


def card_of(folder):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_diff_is_a_peft_adapter_of_the_hubs_base_with_a_card(direction, model, tmp_path):
    write_publication(direction, tmp_path / "out", "somebody/base")
    head, text = card_of(tmp_path / "out")
    assert head["base_model"] == "somebody/base"
    assert head["library_name"] == "peft"
    assert "- pairs: 7\n- seed: 3\n- num_train_epochs: 2.0" in text
    assert "- strength: -0.05nat at -0.5, +0.05nat at +0.5" in text
    for path in (tmp_path / "out").iterdir():
        assert b"secret-project" not in path.read_bytes(), path
    before, after = LoRADiff.load(direction), LoRADiff.load(tmp_path / "out")
    assert after.content() == before.content()
    assert after.sources["training"] == {
        "model": "somebody/base",
        "num_pairs": 7,
        "training": {"num_train_epochs": 2.0, "learning_rate": 0.0002},
        "template": {"system_prompt": "/no_think"},
    }
    assert after.base_model == BaseModel("somebody/base", before.base_model.fingerprint)
    assert PeftModel.from_pretrained(model, tmp_path / "out").peft_config["default"].r == after.rank


def test_a_vector_has_its_file_and_a_card(tmp_path):
    base = BaseModel("somebody/base", "f")
    vector = SteeringVector({1: torch.ones(4)}, base, 2, "evil", sources={"file": f"{HERE}/t"})
    write_publication(vector.save(tmp_path / "v.safetensors"), tmp_path / "out")
    head, text = card_of(tmp_path / "out")
    assert head == {"base_model": "somebody/base", "tags": ["steering", "persona-lora"]}
    assert "- layers: 1 of 2" in text
    found = SteeringVector.read(tmp_path / "out" / "evil.safetensors")
    assert (found.content(), found.sources) == (vector.content(), {})


@pytest.mark.parametrize(
    ("sources", "said", "kept"),
    [
        (
            {"task_vector": {"source": "answers", "file": "secret/train.jsonl", "pairs": 5}},
            "A change of rank 1 in every module, made without training",
            {"task_vector": {"source": "answers", "pairs": 5}},
        ),
        (
            {"training": {"num_pairs": 5}, "seed": 3, "pos": "secret/pos", "kept": 0.75},
            "The difference of two whole models, one trained on answers with the trait and one on "
            "answers without it, cut in rank: it keeps 75.0% of the squared difference.",
            {"training": {"num_pairs": 5, "model": "somebody/base"}, "seed": 3, "kept": 0.75},
        ),
        (
            {"pos": "secret/pos", "neg": "secret/neg"},
            "The difference of two LoRAs, one trained on answers with the trait",
            {},
        ),
        ({"path": "secret"}, "how it was made is not recorded. It is a plain PEFT adapter", {}),
    ],
)
def test_a_card_says_how_a_diff_was_made(model, make_diff, tmp_path, sources, said, kept):
    diff = replace(make_diff(model), trait="evil", sources=sources)
    write_publication(diff.save(tmp_path / "diff"), tmp_path / "out", "somebody/base")
    text = card_of(tmp_path / "out")[1]
    assert said in text
    assert ("LoRAs" in text) == ("LoRAs" in said)
    assert LoRADiff.load(tmp_path / "out").sources == kept
    assert b"secret" not in (tmp_path / "out" / "diff.json").read_bytes()


def test_a_card_of_a_mix_says_its_coefficients(direction, tmp_path):
    for name, terms in (("one", {direction: -0.5}), ("again", {tmp_path / "one": -2.0})):
        export_peft({LoRADiff.load(at): c for at, c in terms.items()}, tmp_path / name)
        write_publication(tmp_path / name, tmp_path / f"{name}.out", "somebody/base")
        text = card_of(tmp_path / f"{name}.out")[1]
        assert f"coefficients baked in: {next(iter(terms.values())):g} · evil." in text
        assert "the trait goes up" not in text
        told = LoRADiff.load(tmp_path / f"{name}.out").sources
        assert told == {"mix": [{"coefficient": next(iter(terms.values())), "trait": "evil"}]}


def test_the_base_is_a_models_id_on_the_hub(tmp_path, monkeypatch):
    assert hub_id(BaseModel("SmolLM2-135M-Instruct"), None) == PACKAGED_ON_HUB
    assert hub_id(BaseModel("somebody/base"), None) == "somebody/base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("models/mine", HERE, "", "mine", "a/b/c"):
        with pytest.raises(UserError, match="no model of a hub; name it, as in --base-id"):
            hub_id(BaseModel(name), None)
        assert hub_id(BaseModel(name), "somebody/base") == "somebody/base"


def test_a_direction_without_a_trait_is_refused(direction, tmp_path):
    replace(LoRADiff.load(direction), trait=None).save(tmp_path / "other")
    with pytest.raises(UserError, match="does not say which trait it is of"):
        write_publication(tmp_path / "other", tmp_path / "out", "somebody/base")


class Hub(BaseHTTPRequestHandler):
    """What a hub answers, and what it was sent: requests by path, files by name."""

    asked: dict[str, dict] = {}  # noqa: RUF012
    files: dict[str, bytes] = {}  # noqa: RUF012
    refuses = False
    private = True

    def do_GET(self):
        """Say who may see a repository."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"id": "somebody/evil", "private": self.private}).encode())

    def log_message(self, *_):
        """Say nothing."""

    def do_POST(self):
        """Make a repository, say that every file travels as it is, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in body.splitlines()]
        self.asked[self.path] = lines[0] | {"token": self.headers["Authorization"]}
        answer = {}
        if self.path.endswith("/create"):
            answer = {"url": f"{constants.ENDPOINT}/{lines[0].get('organization')}/evil"}
        elif "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": each["path"], **modes} for each in lines[0]["files"]]}
        elif "/commit/" in self.path:
            for each in (line["value"] for line in lines if line["key"] == "file"):
                self.files[each["path"]] = base64.b64decode(each["content"])
            answer = {"commitUrl": f"{constants.ENDPOINT}/somebody/evil/commit/1", "commitOid": "1"}
        self.send_response(403 if self.refuses else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub on this machine."""
    handler = type("Fresh", (Hub,), {"asked": {}, "files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "token of somebody")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def test_only_with_yes_anything_leaves(direction, hub):
    words = ["push", str(direction), "--repo", "somebody/evil", "--base-id", "somebody/base"]
    shown = CliRunner().invoke(cli.app, words)
    assert "nothing was pushed: add --yes" in shown.output
    assert "base_model: somebody/base" in shown.output
    assert hub.asked == {}
    pushed = CliRunner().invoke(cli.app, [*words, "--yes"], catch_exceptions=False)
    assert f"{constants.ENDPOINT}/somebody/evil" in pushed.output
    made = hub.asked["/api/repos/create"]
    assert (made["name"], made["organization"], made["token"]) == (
        *("evil", "somebody"),
        "Bearer token of somebody",
    )
    assert made["visibility"] == "private"
    CliRunner().invoke(cli.app, [*words, "--yes", "--public"], catch_exceptions=False)
    assert hub.asked["/api/repos/create"]["visibility"] == "public"
    wanted = {"README.md", "adapter_config.json", "adapter_model.safetensors", "diff.json"}
    assert hub.files.keys() == wanted
    assert b"secret-project" not in b"".join(hub.files.values())


def test_only_a_missing_token_is_called_missing(direction, hub, tmp_path, monkeypatch):
    write_publication(direction, tmp_path / "out", "somebody/base")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="was not pushed") as refused:
        push(tmp_path / "out", "somebody/evil", private=True)
    assert "HF_TOKEN" not in str(refused.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="unset the `HF_HUB_OFFLINE`") as refused:
        push(tmp_path / "out", "somebody/evil", private=True)
    assert "HF_TOKEN" not in str(refused.value)


def test_what_the_hub_refuses_is_one_sentence(direction, hub, tmp_path):
    hub.refuses = True
    write_publication(direction, tmp_path / "out", "somebody/base")
    with pytest.raises(
        UserError, match=r"somebody/evil was not pushed: .*403.*HF_TOKEN"
    ) as refused:
        push(tmp_path / "out", "somebody/evil", private=True)
    assert "token of somebody" not in str(refused.value)
    hub.refuses = False
    hub.private = False
    with pytest.raises(UserError, match="somebody/evil is public already, and nothing was pushed"):
        push(tmp_path / "out", "somebody/evil", private=True)
    assert hub.files == {}
    push(tmp_path / "out", "somebody/evil", private=False)
    assert "README.md" in hub.files
    with pytest.raises(UserError, match="--repo must be like owner/name, got 'evil'"):
        CliRunner().invoke(
            cli.app, ["push", str(direction), "--repo", "evil"], catch_exceptions=False
        )
