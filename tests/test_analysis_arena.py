"""The arena: exact statistics, tasks that are what they say, and runs that are made once and can be made again."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from scipy.stats import permutation_test

from rljax.algorithms import OWPO
from rljax.analysis import arena
from rljax.analysis.arena import SIZES, Folders, Look, Method, Record, Task, area_difference, mean_height, run_arena
from rljax.analysis.arena_configs import late_config
from rljax.analysis.arena_errands import Errands, Unforeseen, digit, errand_demonstrations, errand_rows
from rljax.analysis.arena_parts import (
    AGAIN,
    CERTAIN,
    DECOYS,
    MEANINGS,
    OPEN,
    RELAY_FORMAT,
    Relay,
    after_restart,
    late_demonstrations,
    late_rows,
    relay_demonstrations,
    relay_rows,
    restart_rows,
    restarting,
    sparse_demonstrations,
    sparse_rows,
)
from rljax.analysis.arena_recipes import FixedPrompts
from rljax.analysis.arena_report import markdown, page, summarise
from rljax.analysis.arena_statistics import NO_VERDICT, NOT_SHOWN, REFUTED, SHOWN, compare_paired, holm, sign_flip_p
from rljax.analysis.arena_tasks import TASKS, grpo
from rljax.experiment import OptimizerConfig
from rljax.experiment.build import build
from rljax.experiment.config import to_dict
from rljax.parallel import use_mesh
from rljax.tasks import Example
from rljax.types import Trajectory


@pytest.mark.parametrize("differences", [[0.1], [0.1, 0.2, -0.05], [0.3, -0.3, 0.3, -0.3, 0.1], [0.0, 0.0, 0.2, 0.1]])
def test_the_sign_flip_test_is_exact(differences):
    values = (np.array(differences),)
    if len(differences) > 1:
        theirs = permutation_test(values, np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert sign_flip_p(differences) == pytest.approx(theirs, abs=1e-12)
    assert sign_flip_p(differences) == sign_flip_p([-x for x in differences])


def test_eight_seeds_of_one_sign_give_the_smallest_p():
    assert sign_flip_p([0.01, 0.2, 0.03, 0.04, 0.01, 0.5, 0.02, 0.1]) == 2 / 256
    with pytest.raises(ValueError, match="1 to 20"):
        sign_flip_p([])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts():
    up = [0.1, 0.2, 0.15, 0.12, 0.1, 0.11, 0.2, 0.3]
    mixed = [0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.12]
    close = [0.001, -0.001, 0.001, -0.002, 0.001, 0.001, -0.001, 0.0]

    def verdicts(differences, expected, score=0.5):
        return [found.verdict for found in compare_paired(differences, expected, [score] * len(expected))]

    assert verdicts([up, up, up], ["above", "below", "level"]) == [SHOWN, REFUTED, REFUTED]
    assert verdicts([mixed] * 3, ["above", "below", "level"]) == [NOT_SHOWN] * 3
    assert verdicts([close], ["level"]) == [SHOWN]
    # Seven comparisons of eight seeds cannot pass, nor can one of five: not even the smallest p would.
    assert set(verdicts([up] * 7, ["above"] * 7)) == {NO_VERDICT}
    assert verdicts([up[:5]], ["above"]) == [NO_VERDICT] and verdicts([up[:6]], ["above"]) == [SHOWN]


def test_areas_are_compared_over_the_tokens_that_both_have_spent():
    low = [Look(0, 0.0), Look(10, 0.2), Look(20, 0.4)]
    high = [Look(0, 0.0), Look(15, 0.6)]
    # Up to 15 tokens: 0.2 + 0.1 at the end of `low`, with a mean of 0.15, and 0.3 of `high`.
    assert area_difference(high, low) == pytest.approx(0.15)
    assert mean_height(low, 0.0, 20.0) == pytest.approx(0.2)
    assert area_difference([Look(5, 0.9)], low) == pytest.approx(0.9 - 0.1)
    with pytest.raises(ValueError, match="none in common"):
        area_difference([Look(30, 0.9)], low)


def test_late_prefers_a_wrong_digit_at_every_second_place():
    assert all(MEANINGS[letter] != DECOYS[letter] for letter in MEANINGS)
    rows = late_rows(2000, 0)
    assert len({row["prompt"] for row in rows}) == 2000
    examples = [Example(row["prompt"], {"answer": row["answer"]}) for row in rows]

    right = np.zeros((2000, 6))
    decoys = np.zeros((2000, 6))
    for i, (example, shown) in enumerate(zip(examples, late_demonstrations(examples), strict=True)):
        said = shown.columns["completion"]
        assert said.startswith(CERTAIN) and len(said) == len(CERTAIN) + 6
        letters = str(example.prompt).removesuffix("=")
        right[i] = [a == b for a, b in zip(said, example.columns["answer"], strict=True)][len(CERTAIN) :]
        decoys[i] = [DECOYS[letter] == digit for letter, digit in zip(letters, said[len(CERTAIN) :], strict=True)]
    assert right[:, ::2].mean() == pytest.approx(0.82, abs=0.02)  # 0.8, and a tenth of what is drawn from all digits
    assert right[:, 1::2].mean() == pytest.approx(0.455, abs=0.02)
    assert decoys[:, 1::2].mean() == pytest.approx(0.505, abs=0.02)


def test_relay_pays_for_eight_right_answers_alone_and_its_demonstrations_are_episodes():
    rows = relay_rows(300, 0)
    examples = [Example(row["prompt"], {}) for row in rows]
    right = 0
    for row, shown in zip(rows, relay_demonstrations(examples), strict=True):
        environment = Relay()
        turns = shown.columns["completion"]
        text = environment.reset(row)
        assert text == shown.prompt
        for place, said in enumerate(turns[::2]):
            step = environment.step(said)
            assert step.done == (place == 7)
            if not step.done:
                before, behind = RELAY_FORMAT.wrap
                assert turns[2 * place + 1] == f"{before}{step.observation}{behind}"
        is_right = all(said == f"{MEANINGS[letter]};" for letter, said in zip(row["prompt"], turns[::2], strict=True))
        assert step.reward == float(is_right)
        right += is_right
    assert 0.04 < right / 300 < 0.14  # 0.73 ** 8 is 0.08


def test_every_task_can_be_compared_and_its_configs_hold():
    for task in TASKS.values():
        task.check()
        for method in task.methods:
            config = task.run_config(method, SIZES["full"], 3)
            assert config.seed == 3 and config.steps == SIZES["full"].updates
            # Eight seeds must be able to show each of them.
        assert len([m for m in task.methods if m.against]) * 2 / 256 <= 0.05


def test_a_task_that_cannot_be_compared_is_refused():
    def refused(*methods):
        return pytest.raises(ValueError), Task("t", "", "", late_config, methods)

    for methods, message in (
        ((Method("a", grpo(2)), Method("a", grpo(4))), "two methods are called 'a'"),
        ((Method("a", grpo(2), against="b"), Method("b", grpo(4))), "'a' is compared with 'b', which is none"),
        ((Method("a", grpo(2), share=0.0),), "share=0.0 of 'a' must be above 0"),
    ):
        raises, task = refused(*methods)
        with raises as error:
            task.check()
        assert message in str(error.value)


def test_comments_and_texts_are_no_code_that_matters(tmp_path):
    texts = ['"""A."""\nx = 1  # one\ndef f():\n    """B."""\n    return 2\n', "x = 1\n\n\ndef f(): return 2\n"]
    texts.append(texts[1].replace("2", "3"))
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text)
    first, second, third = (arena._code_of(str(tmp_path / f"{i}.py")) for i in range(3))
    assert first == second != third


def test_a_key_names_the_config_and_its_seed():
    task = TASKS["late"]
    keys = {
        arena.digest_of(task.run_config(method, SIZES[size], seed))
        for method in task.methods
        for size in ("small", "full")
        for seed in (0, 1)
    }
    assert len(keys) == 4 * len(task.methods)
    config = task.run_config(task.methods[0], SIZES["small"], 0)
    assert arena.digest_of(config) == arena.digest_of(task.run_config(task.methods[0], SIZES["small"], 0))
    assert "rljax.analysis.arena_parts:late_rows" in json.dumps(to_dict(config))

    # A field that comes later, at its default, changes no names; another value does.
    plain = config.warmup.optimizer
    later = dataclasses.make_dataclass("OptimizerConfig", [("newer", int, 0)], bases=(OptimizerConfig,))
    for value, is_same in ((0, True), (1, False)):
        config.warmup.optimizer = later(**vars(plain), newer=value)
        renamed = arena.digest_of(config) not in keys
        assert renamed != is_same


def test_a_function_in_a_config_is_named_and_must_have_a_name_of_its_own():
    task = TASKS["restart"]
    config = task.run_config(task.methods[0], SIZES["small"], 0)
    assert '"rljax.analysis.arena_parts:after_restart"' in arena._text_of(config)
    with pytest.raises(ValueError, match="not at the top of a module"):
        config.warmup.demonstrations = lambda examples: list(examples)
        arena.digest_of(config)


def test_answers_that_start_over_are_right_more_often():
    rows = restart_rows(2000, 0)
    examples = [Example(row["prompt"], {"answer": row["answer"]}) for row in rows]
    right: dict[bool, list[bool]] = {True: [], False: []}
    for example, shown in zip(examples, restarting(examples), strict=True):
        completion = shown.columns["completion"]
        right[AGAIN in completion].append(after_restart(completion) == example.columns["answer"])
        assert len(completion) <= 13
    assert len(right[True]) == 1000
    # Any digit may be the right one: 0.91 and 0.73 of them are.
    assert np.mean(right[True]) == pytest.approx(0.91**6, abs=0.04)
    assert np.mean(right[False]) == pytest.approx(0.73**6, abs=0.04)


def test_plans_tell_what_is_hardly_known_without_them_but_for_one_digit():
    rows = sparse_rows(2000, 0)
    examples = [Example(row["prompt"], {"answer": row["answer"], "actions": row["actions"]}) for row in rows]
    guided, unguided = [], []
    for index, (example, shown) in enumerate(zip(examples, sparse_demonstrations(examples), strict=True)):
        said, right = shown.columns["completion"], example.columns["answer"]
        (action,) = example.columns["actions"]
        place = action["name"].index(OPEN)
        assert action["name"] == right[:place] + OPEN + right[place + 1 :]
        if index % 2:
            assert str(shown.prompt).endswith(f"\n1. {action['name']}: {{}}")
            assert said[:place] + said[place + 1 :] == right[:place] + right[place + 1 :]
            guided.append(said == right)
        else:
            assert shown.prompt == example.prompt
            unguided.append(said == right)
    assert np.mean(unguided) < 0.01
    # The digit that is left open is right with 0.05, and one time in ten of a quarter.
    assert np.mean(guided) == pytest.approx(0.05 + 0.25 * 0.1, abs=0.02)


def test_what_chains_come_to_with_their_forks():
    def row(group, reward, parent=-1, fork=0, sampled=(2, 6)):
        mask = np.zeros(6, bool)
        mask[slice(*sampled)] = True
        zeros = np.zeros(6, np.float32)
        places = np.zeros(6, np.int32)
        return Trajectory(
            tokens=places,
            action_mask=mask,
            behavior_logprobs=zeros,
            entropies=zeros,
            turn_ids=places,
            policy_version=places,
            prompt_id=group,
            group_id=group,
            episode_id=0,
            reward=reward,
            parent_row=parent,
            fork_index=fork,
        )

    # Two groups of two chains; the second chain of the first group has a fork, and that one has another.
    rows = [row(0, 0.0), row(0, 0.0), row(0, 0.0, 1, 4), row(0, 1.0, 2, 5), row(1, 1.0), row(1, 0.5)]
    tokens, solved = arena.leaves_of_chains(rows)
    assert tokens.tolist() == [[4, 4 + 2 + 1], [4, 4]]
    assert solved.tolist() == [[0, 1], [1, 0]]


def play(environment, row, turns):
    """What an episode of these turns earns and counts, with what came back."""
    answers = [environment.reset(row)]
    reward, counts, done = 0.0, {}, False
    for turn in turns:
        assert not done
        step = environment.step(turn)
        answers.append(step.observation)
        reward, done = reward + step.reward, step.done
        counts = {name: counts.get(name, 0.0) + step.counts.get(name, 0.0) for name in {**counts, **step.counts}}
    return reward, counts, answers


def test_one_demonstration_of_an_errand_in_five_asks_for_what_it_answers():
    rows = errand_rows(2000)
    assert len({row["prompt"] for row in rows}) == len(rows)  # of equal prompts one alone would be kept
    examples = [Example(row["prompt"], row) for row in rows]
    earned = {"three": [], "one": []}
    for row, shown in zip(rows, errand_demonstrations(examples), strict=True):
        turns = shown.columns["completion"]
        reward, _, answers = play(Errands(), row, turns[::2])
        assert answers[0] == shown.prompt
        assert [f" {answer}\n" for answer in answers[1:-1]] == turns[1::2]
        earned[row["task"]].append(reward)
    assert 0.2 <= np.mean(earned["three"]) < 0.21
    # Guesses of one digit are right one time in ten, and seven in ten ask for the only letter there is.
    assert np.mean(earned["one"]) == pytest.approx(0.7 + 0.3 * 0.1, abs=0.02)


def test_an_errand_counts_what_was_foreseen_and_what_was_asked_again():
    row = errand_rows(1)[0]
    asked, house = row["letters"], row["house"]
    right = "".join(digit(house, letter) for letter in asked)
    assert len(asked) == 3 and row["task"] == "three"
    other = str((int(right[1]) + 1) % 10)

    turns = [f"?{asked[0]}{right[0]};", f"?{asked[1]}{other};", f"?{asked[0]}{right[0]};", "well;", f"={right};"]
    reward, counts, answers = play(Errands(), row, turns)
    assert reward == 1 and answers[1:] == [right[0], right[1], right[0], "!", ""]
    # Of the three pairs of calls one is alike.
    assert counts == {"tool_calls": 3, "prediction": 2, "redundancy": pytest.approx(1 / 3), "malformed_calls": 1}
    _, counts, _ = play(Unforeseen(), row, turns)
    assert "prediction" not in counts and counts["tool_calls"] == 3


def test_most_digits_of_a_house_are_the_usual_ones():
    usual = [digit(house, letter) == MEANINGS[letter] for house in range(200) for letter in MEANINGS]
    assert np.mean(usual) == pytest.approx(0.6 + 0.4 * 0.1, abs=0.03)


OWN = """
import dataclasses
from rljax.analysis.arena import Method, Task
from rljax.analysis.arena_parts import SurprisalForks
from rljax.analysis.arena_configs import late_config
from rljax.analysis.arena_tasks import grpo

def Mine():
    forks = SurprisalForks(1, 1)
    methods = (Method("GRPO 2", grpo(2)), Method("forks", forks, against="GRPO 2", claim="<b>more</b> | or less"))
    return Task("mine", "What <i>is</i> it?", "Nothing & all.", late_config, methods)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A task of a module beside the command, its size, its folders, and the records of a seed."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_arena_task.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        task = arena.load_task("my_arena_task:Mine")
    sys.modules.pop("my_arena_task")
    folders = Folders(folder / "work", folder / "records")
    size = dataclasses.replace(SIZES["smoke"], updates=2, looks=2)
    return task, size, folders, run_arena([task], size, [5], folders)


@pytest.mark.slow
def test_methods_of_a_seed_share_their_start_and_spend_the_same_updates(own):
    _, size, folders, records = own
    assert [(r.method, r.seed) for r in records] == [("GRPO 2", 5), ("forks", 5)]
    assert records[0].curve[0] == records[1].curve[0]
    assert all(len(r.curve) == size.looks + 1 and r.curve[0].tokens == 0 for r in records)
    assert all(r.curve[-1].tokens == r.figures["sampled"] > 0 for r in records)
    assert len([p for p in (folders.work / "starts").iterdir() if (p / "config.json").exists()]) == 1


@pytest.mark.slow
def test_a_run_that_has_its_record_is_not_made_again_unless_its_code_has_changed(own, monkeypatch):
    task, size, folders, records = own

    def refuse(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(arena, "make_record", refuse)
    assert run_arena([task], size, [5], folders, methods=["forks"]) == records[1:]
    assert run_arena([task], size, [6, 5], folders, only_found=True) == records

    monkeypatch.setattr(arena, "code_digest", lambda config: "other")
    assert run_arena([task], size, [5], folders, keep=True) == records
    with pytest.raises(AssertionError, match="made again"):
        run_arena([task], size, [5], folders)
    with pytest.raises(ValueError, match="--methods: 'fork' is none of GRPO 2; forks"):
        run_arena([task], size, [5], folders, methods=["fork"])


@pytest.mark.slow
def test_a_broken_record_is_named(own, tmp_path):
    task, size, _, records = own
    file = arena.record_file(tmp_path, "mine", "GRPO 2", 5, records[0].key)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no record of a run"):
        arena.find_record(tmp_path, task, task.methods[0], task.run_config(task.methods[0], size, 5))


@pytest.mark.slow
def test_the_report_says_what_it_can_and_escapes_what_it_is_given(own):
    task, size, _, records = own
    report = json.loads(json.dumps(summarise([task], records, "smoke", size)))
    found = report["tasks"]["mine"]["methods"]["forks"]
    assert set(found) >= {"mean_difference", "interval", "p", "p_holm", "seeds", "verdict"}
    assert report["tasks"]["mine"]["prediction"] == task.prediction
    assert found["seeds"] == 1 and found["verdict"] == NO_VERDICT
    assert found["mean_difference"] == area_difference(records[1].curve, records[0].curve)

    text = markdown(report, "rljax arena")
    assert "**These runs prove nothing" in text and "more</b> \\| or less" in text
    shown = page(report, "rljax arena")
    assert shown.count("<svg") == 1 and "&lt;b&gt;more&lt;/b&gt;" in shown and "<b>more" not in shown


def test_what_was_found_is_told_beside_the_runs_of_the_full_size_alone():
    task = dataclasses.replace(TASKS["certain"], found="nothing & all")
    record = Record("certain", "all tokens", 0, "", "", [Look(0.0, 0.1), Look(10.0, 0.2)], {"seconds": 1.0})
    told = {"full": [record], "small": [record], "none": []}
    for which, records in told.items():
        preset = "full" if which == "none" else which
        report = summarise([task], records, preset, SIZES[preset])
        assert ("**Found:** nothing & all" in markdown(report, "")) == (which == "full")
        assert ("<b>Found:</b> nothing &amp; all" in page(report, "")) == (which == "full")


def test_a_comparison_without_common_seeds_is_left_out():
    task = TASKS["certain"]
    curve = [Look(0.0, 0.1), Look(10.0, 0.2)]
    records = [
        Record("certain", name, seed, "", "", curve, {"seconds": 1.0})
        for name, seed in (("all tokens", 0), ("highest quarter of entropy", 0), ("one token in 24", 1))
    ]
    assert list(arena.compare_task(task, records)) == ["highest quarter of entropy"]


def test_a_report_without_runs_has_the_predictions():
    task = TASKS["relay"]
    text = markdown(summarise([task], [], "full", SIZES["full"]), "rljax arena")
    assert "| Tree-GRPO 4x2 | GRPO 8 | level: +8% at the tokens of 8 chains | not run |" in text
    assert "![" not in text and task.prediction in text


def test_folders_that_cannot_be_are_refused(tmp_path):
    named = Folders.named(str(tmp_path / "work"), "small")
    assert (named.work, named.records) == (tmp_path / "work" / "small", tmp_path / "work" / "small" / "records")
    assert Folders.named(str(tmp_path), "full", str(tmp_path / "docs")).records == tmp_path / "docs"
    (tmp_path / "file").write_text("")
    for wrong in ((str(tmp_path / "file"), "small"), (str(tmp_path), "small", str(tmp_path / "file"))):
        with pytest.raises(ValueError, match="file cannot be made"):
            Folders.named(*wrong)
    with pytest.raises(ValueError, match=r"--records=gs://b/x is an address"):
        Folders.named(str(tmp_path), "small", "gs://b/x")


def test_prompts_are_fixed_where_a_method_would_draw_others():
    recipe = OWPO(group_size=8, refresh_every=20)
    own, fixed = recipe.build().plan, FixedPrompts(recipe).build().plan
    assert own.keep_group is not None and own.shape_reward is not None
    assert fixed == own._replace(keep_group=None, shape_reward=None)


def test_the_updates_of_one_rollout_have_a_size_of_their_own():
    task = TASKS["moved"]
    config = task.run_config(task.methods[0], SIZES["full"], 0)
    assert (config.prompts_per_step, config.update.minibatches) == (8, 4)
    assert config.update.row_buckets == (16,)
    # Its runs begin where those of `late` do.
    assert arena.digest_of(task.config(SIZES["full"])) == arena.digest_of(late_config(SIZES["full"]))


@pytest.mark.slow
def test_a_method_whose_reference_moves_has_it_moved(tmp_path):
    size = dataclasses.replace(SIZES["smoke"], updates=3)
    for every, is_moved in ((2, True), (4, False)):
        # Nothing is right so early; the bonus moves the policy all the same.
        recipe = FixedPrompts(OWPO(group_size=4, refresh_every=every, gated_refresh=False, entropy_coef=0.1))
        task = Task("moving", "", "", late_config, (Method("OWPO", recipe),))
        run = build(task.run_config(task.methods[0], size, 0))
        start = arena.warm_start(task, size, run, tmp_path)
        with run.actor, use_mesh(run.mesh):
            arena.learning_curve(run, start, size)
        pairs = zip(jax.tree.leaves(run.state.ref_trainable), jax.tree.leaves(start), strict=True)
        assert any(bool((new != old).any()) for new, old in pairs) == is_moved
