"""Rows that servers answer: as the model here does, none lost, nothing asked of a wrong one."""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import ExitStack

import pytest
import torch

from persona_lora.core.chat import UNSTEERED, Condition
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.options import GenerationOptions
from persona_lora.core.personas import Coefficients
from persona_lora.core.runs import Run
from persona_lora.core.shared_basis import on_one_basis
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.engines import remote
from persona_lora.engines.remote import check_servers, open_engine
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import Processes
from persona_lora.steering.bank import ActivationSetting, Bank
from persona_lora.studies.asking.run import Row, Steering, answer_rows
from persona_lora.studies.personas.objective import Speaker
from tests.conftest import random_diff, tiny_llama
from tests.engines.stand_in import DOWN, StandIn, dies_after, is_row, served

pytestmark = pytest.mark.usefixtures("quick")
OPTIONS = GenerationOptions(max_new_tokens=6)


@pytest.fixture
def chat_model(tokenizer) -> ChatModel:
    return ChatModel(tiny_llama(), tokenizer, "tiny")


@pytest.fixture
def bank(chat_model) -> Bank:
    made = {
        name: random_diff(chat_model.model, seed=seed, rank=2, scale=0.2)
        for seed, name in enumerate(("calm", "evil"))
    }
    return Bank(diffs=on_one_basis(made).diffs)


@pytest.fixture
def serve():
    """Serves stand-ins until the test ends."""
    with ExitStack() as stack:
        yield lambda stand_in: stack.enter_context(served(stand_in))


MIXES = ({}, {"calm": 1.0}, {"evil": -2.0}, {"calm": 0.5, "evil": 1.5})
PLAN = [
    Row(f"Question {number}?", Condition("mix", number % len(MIXES)), stream=1000 * number)
    for number in range(12)
]
ROWS = [MIXES[number % len(MIXES)] for number in range(12)]


def answered(chat_model, bank, tmp_path, name="run"):
    with Run.open(tmp_path / name, command="test", config={}, seed=0, inputs={}) as run:
        return answer_rows(chat_model, PLAN, bank.answering(chat_model, ROWS), run, OPTIONS)


def by_engine(chat_model, bank, *urls: str) -> Bank:
    held = [diff for name, diff in bank.diffs.items() if name not in bank.here]
    return dataclasses.replace(bank, elsewhere=open_engine(urls, chat_model, held))


def test_a_server_answers_as_the_model_here_and_is_asked_for_every_mix(
    chat_model, bank, serve, tmp_path, told
):
    server = StandIn(chat_model, [*bank.diffs.values()])
    found = answered(chat_model, by_engine(chat_model, bank, serve(server)), tmp_path, "engine")
    assert told[-1] == ("answering", 12, 12)
    assert found == answered(chat_model, bank, tmp_path)
    names = {"tiny", "mix:c0ffee:1.0,0.0", "mix:c0ffee:0.0,-2.0", "mix:c0ffee:0.5,1.5"}
    assert set(server.rows) == names


def test_an_evaluation_steers_by_the_engine_and_asks_prompts_of_the_plain_model(
    chat_model, bank, serve
):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = open_engine([serve(server)], chat_model, [*bank.diffs.values()])
    rows = [Row("Why?", UNSTEERED), Row("Who?", UNSTEERED)]
    for steering in (Steering({bank.diffs["evil"]: 1.5}), Steering(system_prompt="Be odd.")):
        conversations = [[{"role": "user", "content": row.question}] for row in rows]
        plan = remote.RowPlan(streams=[0, 1])
        asked = chat_model, conversations, [0, 1], OPTIONS, plan
        with steering.steerer(chat_model) as steerer:
            here = steerer.answers(*asked)
        there = dataclasses.replace(steering, elsewhere=engine).steerer(chat_model)
        assert there.answers(*asked) == here
    assert server.rows == ["mix:c0ffee:0.0,1.5"] * 2 + ["tiny"] * 2


def test_rows_of_one_stream_have_one_seed_and_nothing_is_sampled_beside(chat_model, bank, serve):
    bodies = []
    server = StandIn(chat_model, [], failing=bodies.append)
    engine = open_engine([serve(server)], chat_model, [])
    options = GenerationOptions(max_new_tokens=2, temperature=0.7, seed=5)
    conversations = [[{"role": "user", "content": "Why?"}]] * 3
    plan = remote.RowPlan(streams=[0, 7, 7])
    engine.steerer([{}]).answers(chat_model, conversations, [0, 1, 2], options, plan)
    sent = sorted((body for body in bodies if "seed" in body), key=lambda body: body["seed"])
    assert len({body["seed"] for body in sent}) == 2
    assert sent[1]["seed"] == sent[2]["seed"]
    beside = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    assert all(body.items() >= beside.items() for body in sent)


def test_a_diff_that_was_loaded_twice_is_one(chat_model, bank, serve):
    server = StandIn(chat_model, [*bank.diffs.values()])
    again = [dataclasses.replace(each) for each in bank.diffs.values()]
    engine = open_engine([serve(server)], chat_model, [*bank.diffs.values(), *again])
    assert (
        engine.steerer([{again[0]: 1.0}]).rows == engine.steerer([{bank.diffs["calm"]: 1.0}]).rows
    )
    (twice,) = engine.steerer([{again[0]: 1.0, bank.diffs["calm"]: 0.5}]).rows
    assert list(twice.values()) == [1.5]


def test_what_is_steered_here_is_answered_here_and_the_rest_by_the_engine(
    chat_model, bank, serve, tmp_path
):
    vector = SteeringVector({0: torch.ones(32)}, BaseModel("tiny", None), 2)
    random = random_diff(chat_model.model, seed=7, rank=2, scale=0.2)
    both = Bank({**bank.diffs, "random": random}, {"v": vector}, here=("random", "v"))
    mixes = [{}, {"calm": 1.0, "v": 0.0}, {"random": 1.0}, {"v": 2.0}, {"calm": 1.0, "v": -2.0}]
    plan = [Row(f"Question {at}?", Condition("mix", at), stream=1000 * at) for at in range(5)]
    server = StandIn(chat_model, [*bank.diffs.values()])
    found = {}
    for name, each in (("here", both), ("there", by_engine(chat_model, both, serve(server)))):
        with Run.open(tmp_path / name, command="test", config={}, seed=0, inputs={}) as run:
            steerer = each.answering(chat_model, mixes)
            found[name] = answer_rows(chat_model, plan, steerer, run, OPTIONS)
            assert sorted(row["row"] for row in run.read("answers")) == list(range(5))
    assert found["here"] == found["there"]
    assert len({each.answer for each in found["here"]}) > 1
    assert sorted(server.rows) == ["mix:c0ffee:1.0,0.0", "tiny"]


# -- handshakes ----------------------------------------------------------------------------------


def test_another_model_is_refused(chat_model, bank, serve):
    other = copy.deepcopy(chat_model)
    other.model.model.layers[1].mlp.up_proj.weight.data *= 1.1
    with pytest.raises(UserError, match="serves another model"):
        open_engine([serve(StandIn(other, []))], chat_model, [])


def test_a_mix_that_is_not_what_the_diffs_make_is_refused(chat_model, bank, serve):
    server = StandIn(chat_model, [*bank.diffs.values()])
    server.diffs.reverse()
    with pytest.raises(UserError, match=r"under 'mix:c0ffee:.*lacks the plugin"):
        by_engine(chat_model, bank, serve(server))


def test_a_mix_that_is_ignored_is_refused(chat_model, bank, serve):
    server = StandIn(chat_model, [*bank.diffs.values()])
    server.diffs = [diff * 0.0 for diff in server.diffs]
    with pytest.raises(UserError, match="lacks the plugin"):
        by_engine(chat_model, bank, serve(server))


@pytest.mark.parametrize("plugin", [True, False])
def test_a_server_that_does_not_hold_the_diffs_is_refused(chat_model, bank, serve, plugin):
    held = [*bank.diffs.values()] if not plugin else [bank.diffs["calm"]]
    url, diffs = serve(StandIn(chat_model, held, plugin=plugin)), [*bank.diffs.values()]
    with pytest.raises(UserError, match="does not hold the diffs"):
        by_engine(chat_model, bank, url)
    with pytest.raises(UserError, match="does not hold the diffs"):
        check_servers([url], diffs)
    check_servers([url], diffs[:plugin])  # the plain model, or what it holds


def test_a_url_where_nothing_answers_or_no_vllm_is_refused(chat_model, serve):
    with pytest.raises(UserError, match=r"no engine answers at http://127\.0\.0\.1:9/v1"):
        open_engine(["http://127.0.0.1:9"], chat_model, [])
    with pytest.raises(UserError, match=r"no engine answers at http://127\.0\.0\.1:9/v1"):
        check_servers(["http://127.0.0.1:9"], [])
    url = serve(StandIn(chat_model, [], failing=lambda body: (200, {"choices": [{"text": "a"}]})))
    with pytest.raises(UserError, match="takes no prompt of 'tiny' as it stands"):
        open_engine([url], chat_model, [])


# -- failures ------------------------------------------------------------------------------------


def test_rows_of_a_server_that_dies_go_to_another(chat_model, bank, serve, tmp_path):
    alive, dying = (StandIn(chat_model, [*bank.diffs.values()]) for _ in range(2))
    urls = serve(dying), serve(alive)
    engine = by_engine(chat_model, bank, *urls)
    dying.failing = dies_after(3)
    found = answered(chat_model, engine, tmp_path, "engine")
    assert found == answered(chat_model, bank, tmp_path)
    assert (len(dying.rows), len(alive.rows)) == (3, 9)


def test_a_server_comes_back_after_a_handshake(chat_model, bank, serve, tmp_path, caplog):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = by_engine(chat_model, bank, serve(server))
    dies, down = dies_after(3), []

    def failing(body):
        down.extend([DOWN] if dies(body) else [])
        return DOWN if 0 < len(down) < 4 else None

    server.failing = failing
    assert answered(chat_model, engine, tmp_path, "engine") == answered(chat_model, bank, tmp_path)
    assert len(down) >= 4
    assert f"{engine.elsewhere.urls[0]} is back" in caplog.text


def test_where_all_are_gone_what_is_answered_is_kept_and_the_rest_is_asked_later(
    chat_model, bank, serve, tmp_path
):
    server = StandIn(chat_model, [*bank.diffs.values()])
    url = serve(server)
    engine = by_engine(chat_model, bank, url)
    server.failing = dies_after(5)
    with pytest.raises(UserError, match=r"no engine is left .*503.*give the same command again"):
        answered(chat_model, engine, tmp_path, "engine")
    assert len(Run(tmp_path / "engine").read("answers")) == 5
    server.failing = lambda body: None
    found = answered(chat_model, by_engine(chat_model, bank, url), tmp_path, "engine")
    assert found == answered(chat_model, bank, tmp_path)
    assert len(server.rows) == len(PLAN)


def test_a_server_that_comes_back_with_another_model_stops_the_run(
    chat_model, bank, serve, tmp_path
):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = by_engine(chat_model, bank, serve(server))
    server.model.model.layers[0].mlp.up_proj.weight.data *= 1.1
    with pytest.raises(UserError, match="serves another model"):
        answered(chat_model, engine, tmp_path)


def test_a_refused_row_stops_and_is_named(chat_model, bank, serve, tmp_path):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = by_engine(chat_model, bank, serve(server))
    refused = 400, {"error": {"message": "maximum context length is 8"}}
    server.failing = lambda body: refused if is_row(body) else None
    with pytest.raises(UserError, match=r"refuses row \d+: HTTP 400: maximum context length is 8"):
        answered(chat_model, engine, tmp_path)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, None, "0"])
def test_an_answer_of_logits_that_are_not_finite_is_refused(
    chat_model, bank, serve, tmp_path, logprob
):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = by_engine(chat_model, bank, serve(server))
    choice = {"token_ids": [5], "logprobs": {"token_logprobs": [logprob]}}
    server.failing = lambda body: (200, {"choices": [choice]}) if is_row(body) else None
    with pytest.raises(UserError, match="NaN or infinity"):
        answered(chat_model, engine, tmp_path)


@pytest.mark.parametrize("ids", [None, [], ["5"], [-1], [2**32]])
def test_an_answer_that_is_not_of_tokens_is_refused(chat_model, bank, serve, tmp_path, ids):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = by_engine(chat_model, bank, serve(server))
    logprobs = {"token_logprobs": [-1.0] * len(ids or ())}
    reply = 200, {"choices": [{"token_ids": ids, "logprobs": logprobs}]}
    server.failing = lambda body: reply if is_row(body) else None
    with pytest.raises(UserError, match=r"refuses row \d+: the reply has no token ids"):
        answered(chat_model, engine, tmp_path)


def test_an_answer_that_a_server_gave_up_is_asked_for_again(chat_model, bank, serve, tmp_path):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = by_engine(chat_model, bank, serve(server))
    choice = {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}
    given_up = []

    def failing(body):
        if not is_row(body) or given_up:
            return None
        given_up.append(body)
        return 200, {"choices": [choice]}

    server.failing = failing
    assert answered(chat_model, engine, tmp_path, "engine") == answered(chat_model, bank, tmp_path)


@pytest.mark.parametrize("logprob", [10**400, "1", None, {}])
def test_a_handshake_that_cannot_be_read_is_refused(chat_model, serve, logprob):
    def failing(body):
        places = [{str(token): {"logprob": logprob}} for token in body["prompt"]]
        return 200, {"choices": [{"prompt_logprobs": places}]}

    with pytest.raises(UserError, match=r"malformed|serves another model"):
        open_engine([serve(StandIn(chat_model, [], failing=failing))], chat_model, [])


def test_what_an_engine_cannot_do_is_refused(chat_model, bank, serve):
    server = StandIn(chat_model, [*bank.diffs.values()])
    engine = open_engine([serve(server)], chat_model, [*bank.diffs.values()])
    vector = SteeringVector({0: torch.ones(32)}, BaseModel("tiny", None), 2)
    with pytest.raises(UserError, match="adds no vectors"):
        Bank(vectors={"v": vector}, elsewhere=engine).answering(chat_model, [{}])
    setting = ActivationSetting({vector: 1.0})
    with pytest.raises(UserError, match="adds no vectors"):
        Steering(activation=setting, elsewhere=engine).steerer(chat_model)
    with pytest.raises(UserError, match="holds diffs live"):
        Steering({bank.diffs["evil"]: 1.0}, mode="merged", elsewhere=engine).steerer(chat_model)
    with pytest.raises(UserError, match="not opened with"):
        engine.steerer([{bank.diffs["evil"] * 2.0: 1.0}])


def test_a_search_asks_the_engine_for_its_candidates(chat_model, bank, serve):
    server = StandIn(chat_model, [*bank.diffs.values()])
    scales, held = dict.fromkeys(bank.names, 0.5), by_engine(chat_model, bank, serve(server))
    rows = [Row("Why?", Coefficients.of({"calm": 1.5, "evil": -1.0})), Row("Who?", None)]
    spoken = [Speaker(chat_model, each, scales, 2.0, OPTIONS, Processes()) for each in (bank, held)]
    assert spoken[0].answers(rows) == spoken[1].answers(rows)
    assert sorted(server.rows) == ["mix:c0ffee:1.5,-1.0", "tiny"]
