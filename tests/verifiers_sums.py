"""A taskset of verifiers 0.4, for tests: add one, or fail in some way."""

import verifiers.v1 as vf

TRIES: dict[str, int] = {}


class SumsConfig(vf.TasksetConfig):
    size: int = 4
    failing: int = 3
    flaky: int = -1
    lost: bool = False


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData]):
    @vf.reward
    async def is_right(self, trace) -> float:
        TRIES[self.data.answer] = TRIES.get(self.data.answer, 0) + 1
        if self.data.answer == "raise" or (self.data.answer == "flaky" and TRIES["flaky"] % 2):
            raise KeyError("no such thing")
        return float(self.data.answer in trace.last_reply)

    @vf.reward(weight=0.5)
    async def is_short(self, trace) -> float:
        return float(len(trace.last_reply) < 40)


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self):
        for number in range(self.config.size):
            if self.config.lost and number == 1 and not TRIES.pop("found again", 0):
                TRIES["found again"] = 1
                raise ConnectionError("the data are away")
            named = {self.config.failing: "raise", self.config.flaky: "flaky"}
            data = SumsData(prompt=f"{number}?", answer=named.get(number, str(number)), system_prompt="n")
            yield SumsTask(data, self.config.task)


__all__ = ["SumsTaskset"]
