"""A small task over turns for tests: find a hidden number by asking whether it is larger."""

import json
import random
import time
import urllib.request

from rljax.envs import Parsed, Step, ToolFormat

FORMAT = ToolFormat("plain", lambda text: Parsed(), stop_strings=(";",), wrap=(" ", "\n"))


def rows(size: int, first: int = 0) -> list[dict]:
    numbers = range(first, first + size)
    return [
        {
            "prompt": f"n{i}",
            "number": i % 10,
            "actions": [{"name": "ask", "arguments": {"x": x}} for x in (2, 5, 8)],
            "task": ("even", "odd")[i % 2],
        }
        for i in numbers
    ]


def chat(base_url: str, row: dict) -> float:
    """An agent of its own: two questions to the policy; the reward is for an answer with a letter."""
    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        body = json.dumps({"model": "policy", "messages": messages, "max_tokens": 6}).encode()
        request = urllib.request.Request(f"{base_url}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)["choices"][0]["message"]
        messages += [{"role": "assistant", "content": said["content"]}, {"role": "user", "content": "more"}]
    return float(any(c.isalpha() for c in said["content"] or ""))


class Ask:
    """Says whether the digit asked for is too small; every episode has `most` turns at most."""

    def __init__(self, most: int = 3):
        self._most = most

    def reset(self, row):
        self._number, self._turns = row["number"], 0
        return f"{row['prompt']}:"

    def step(self, action):
        self._turns += 1
        digits = [c for c in action if c.isdigit()]
        if not digits:
            return Step("?", done=self._turns >= self._most, counts={"malformed_calls": 1.0})
        guess = int(digits[0])
        if guess == self._number:
            return Step("y", 1.0, True, {"tool_calls": 1.0})
        said = "<" if self._number < guess else ">"
        counts = {"tool_calls": 1.0, "prediction": float(said in action), "redundancy": 0.1 * self._turns}
        return Step(said, 0.0, self._turns >= self._most, counts)


class Unsteady(Ask):
    """Takes another time for every answer, in every process."""

    def step(self, action):
        time.sleep(random.SystemRandom().choice([0, 0, 0.002, 0.02]))
        return super().step(action)


class Fragile(Ask):
    """Breaks down when it hears a 7."""

    def step(self, action):
        if "7" in action:
            raise OSError("the tool is gone")
        return super().step(action)
