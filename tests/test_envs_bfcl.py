"""BFCL multi-turn: its own checker decides, episodes share nothing, bad calls become observations."""

import ast
import gc
import json
import re
from pathlib import Path

import pytest

utils = pytest.importorskip(
    "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils",
    reason="needs bfcl-eval: pip install 'rljax-lm[bfcl]' && pip install --no-deps bfcl-eval==2026.3.23",
)

from rljax.envs import EnvironmentLimits, EnvironmentPool  # noqa: E402
from rljax.envs.library.bfcl import CATEGORIES, STEPS_PER_TURN, BfclEnvironment, rows  # noqa: E402

LIMITS = EnvironmentLimits(turns=100)


def instances():
    return {name for name in vars(utils) if name.endswith("_instance")}


def as_calls(written, schemas):
    """The true calls of a turn, which are Python text, as a model would write them."""
    message = ""
    parameters = {s["function"]["name"]: list(s["function"]["parameters"]["properties"]) for s in schemas}
    for text in written:
        call = ast.parse(text, mode="eval").body
        names = parameters[call.func.id]
        arguments = {name: ast.literal_eval(value) for name, value in zip(names, call.args)}
        arguments |= {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        body = json.dumps({"name": call.func.id, "arguments": arguments})
        message += f"<tool_call>\n{body}\n</tool_call>\n"
    return message


def play(row, environment, *, skip=()):
    """Play the true calls, but for those of the turns `skip`."""
    environment.reset(row)
    steps = []
    for turn, written in enumerate(row["ground_truth"]):
        if written and turn not in skip:
            schemas = [*environment.schemas, *environment._later]  # one row's truth uses a function before it is shown
            steps.append(environment.step(as_calls(written, schemas)))
        steps.append(environment.step("Done."))
    return steps


@pytest.mark.parametrize("category", CATEGORIES)
def test_true_calls_score_one_and_missing_ones_zero(category):
    for row in rows(category)[9::20]:
        steps = play(row, BfclEnvironment())
        assert steps[-1].done and steps[-1].reward == 1.0, row["id"]
        assert not any(step.done for step in steps[:-1])
        last = max(turn for turn, written in enumerate(row["ground_truth"]) if written)
        assert play(row, BfclEnvironment(), skip={last})[-1].reward == 0.0


def test_the_pool_plays_an_episode_and_a_fork_starts_from_the_state_of_its_turn():
    row = rows("base", size=1)[0]
    truth = [as_calls(written, schemas_of(row)) for written in row["ground_truth"]]
    before = instances()
    with EnvironmentPool(BfclEnvironment, workers=2, limits=LIMITS) as pool:
        right = pool.start(row).result()
        assert right.opening[1] == {"role": "user", "content": row["prompt"]}
        for message in truth[:2]:
            pool.step(right, message).result()
            pool.step(right, "Done.").result()
        wrong = pool.fork(right, 2).result()
        for message in truth[2:]:
            pool.step(right, message).result()
            pool.step(right, "Done.").result()
        for _ in range(3):
            pool.step(wrong, "I cannot do that.").result()
        assert (right.end, right.reward) == ("done", 1.0)
        assert (wrong.end, wrong.reward) == ("done", 0.0)
        assert right.counts["tool_errors"] == 0.0 and right.counts["requests"] == 4.0
        pool.release(right)
        pool.release(wrong)
    gc.collect()
    assert instances() == before


def schemas_of(row):
    environment = BfclEnvironment()
    environment.reset(row)
    return environment.schemas


def test_episodes_of_one_row_do_not_share_state():
    row = rows("base", size=1)[0]
    before = instances()
    one, two = BfclEnvironment(), BfclEnvironment()
    for environment in (one, two):
        environment.reset(row)
    call = '<tool_call>{"name": "cd", "arguments": {"folder": "document"}}</tool_call>'
    assert "document" in one.step(call).observation
    assert one.step(call).observation.startswith("{") and "error" in one.step(call).observation
    assert "error" not in two.step(call).observation
    del one, two, environment
    gc.collect()
    assert instances() == before


@pytest.mark.parametrize(
    "action, says, counted",
    [
        ('<tool_call>{"name": "cd", "argu', "never closed", "malformed_calls"),
        ('<tool_call>{"name": "fly", "arguments": {}}</tool_call>', "There is no function 'fly'", "tool_errors"),
        ('<tool_call>{"name": "print(1) or cd"}</tool_call>', "There is no function", "tool_errors"),
        ('<tool_call>{"name": "cd", "arguments": {"a=print(1),b": 1}}</tool_call>', "has no argument", "tool_errors"),
        ('<tool_call>{"name": "cd", "arguments": {"place": 1}}</tool_call>', "unexpected keyword", "tool_errors"),
        ('<tool_call>{"name": "cd", "arguments": {"folder": "x\') or print(1"}}</tool_call>', "No such", "tool_calls"),
    ],
)
def test_a_bad_call_is_an_observation_and_nothing_of_it_is_run_as_python(action, says, counted, capsys):
    environment = BfclEnvironment()
    environment.reset(rows("base", size=1)[0])
    step = environment.step(action)
    assert says in step.observation and not step.done
    assert step.counts[counted] == 1.0
    assert capsys.readouterr().out == ""


def test_numbers_that_would_never_come_back_are_refused():
    row = next(row for row in rows("base") if "MathAPI" in row["involved_classes"])
    environment = BfclEnvironment()
    environment.reset(row)
    for name, arguments in (
        ("power", {"base": 10, "exponent": 10**9}),
        ("square_root", {"number": 2, "precision": 10**9}),
    ):
        call = json.dumps({"name": name, "arguments": arguments})
        assert "too large" in environment.step(f"<tool_call>{call}</tool_call>").observation
    call = json.dumps({"name": "power", "arguments": {"base": 2, "exponent": 10}})
    assert "1024" in environment.step(f"<tool_call>{call}</tool_call>").observation


def test_functions_that_are_held_back_are_shown_with_their_request():
    row = rows("miss_func", size=1)[0]
    turn, names = next(iter(row["missed_function"].items()))
    environment = BfclEnvironment()
    opening = environment.reset(row)
    shown = f'{{"name": "{names[0]}"'
    assert shown not in opening[0]["content"]
    steps = [environment.step("I lack a function.") for _ in range(int(turn))]
    assert [shown in step.observation for step in steps] == [False] * (int(turn) - 1) + [True]
    assert names[0] in [schema["function"]["name"] for schema in environment.schemas]


def test_schemas_are_json_schema_and_the_opening_says_how_to_call():
    environment = BfclEnvironment(tool_format="llama3")
    opening = environment.reset(rows("base", size=1)[0])
    assert '"parameters": {ARGUMENT: VALUE' in opening[0]["content"]
    assert all(schema["function"]["parameters"]["type"] == "object" for schema in environment.schemas)
    assert '"type": "dict"' not in json.dumps(environment.schemas)
    assert "document" in environment.step('{"name": "cd", "parameters": {"folder": "document"}}').observation
    assert BfclEnvironment(system="").reset(rows("base", size=1)[0])[0]["role"] == "user"


def test_too_many_messages_on_one_request_end_the_episode():
    environment = BfclEnvironment()
    environment.reset(rows("base", size=1)[0])
    call = '<tool_call>{"name": "pwd", "arguments": {}}</tool_call>'
    steps = [environment.step(call) for _ in range(STEPS_PER_TURN + 1)]
    assert [step.done for step in steps] == [False] * STEPS_PER_TURN + [True]
    assert steps[-1].reward == 0.0


def test_unknown_categories_and_formats_are_named():
    with pytest.raises(ValueError, match=r"category 'simple' is not one of base, miss_func"):
        rows("simple")
    with pytest.raises(ValueError, match="tags"):
        BfclEnvironment(tool_format="tags")


def test_the_example_of_the_docs_runs():
    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "BfclEnvironment(" in block]
    exec(block, {})
