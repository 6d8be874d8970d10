"""Makers of tasks and a policy without a model, for tests of curricula that make tasks."""

from rljax.tasks import Example, SeenGroup


def has_answer(completion, answer):
    """Whether the answer is anywhere in it: an untrained model is right now and then."""
    return float(answer in completion)


class HasAnswer:
    """The same; its first letter is what it takes for the answer."""

    def __call__(self, completion, answer):
        return has_answer(completion, answer)

    def answer_in(self, completion):
        return completion[:1]


class EchoMaker:
    """Tasks of `rljax.tasks.echo`: the first two letters of a text are a task's."""

    def __init__(self, letters="abcdefgh"):
        self.letters = letters

    def prompt_of(self, source, why, texts):
        return f"={source.prompt[:2]}="

    def task_of(self, text, source):
        pair = text[:2]
        if len(pair) < 2 or set(pair) - set(self.letters):
            return None
        return Example(f"{pair}=", {"answer": pair[0]})

    def labelled(self, task, label):
        return Example(task.prompt, {"answer": label})


class OnlyTasks:
    """A maker of tasks that cannot give a question its answer."""

    prompt_of = EchoMaker.prompt_of
    task_of = EchoMaker.task_of


class Script:
    """A player whose answers are told: `texts` by prompt, in order; a text earns 1 if it is the answer, and `partial`
    if it begins with it. Prompts of more than `longest` letters cannot be played."""

    def __init__(self, texts, longest=8, partial=0.0):
        self.texts = texts
        self.longest = longest
        self.partial = partial
        self.played = []

    def can_play(self, example):
        return len(example.prompt) <= self.longest

    def play(self, examples, samples, *, temperature=None):
        self.played.append(([example.prompt for example in examples], samples))
        groups = []
        for example in examples:
            said = self.texts.get(example.prompt, ["?"])
            texts = [said[i % len(said)] for i in range(samples)]
            answer = example.columns.get("answer", "")
            rewards = [float(t == answer) or self.partial * t.startswith(answer) for t in texts]
            groups.append(SeenGroup(example, texts, rewards, answers=[None if t == "?" else t for t in texts]))
        return groups
