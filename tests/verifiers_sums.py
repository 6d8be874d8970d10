"""A taskset of verifiers 0.4, for tests: add one, or fail in some way."""

import verifiers.v1 as vf


class SumsConfig(vf.TasksetConfig):
    size: int = 4
    failing: int = 3


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData]):
    @vf.reward
    async def is_right(self, trace) -> float:
        if self.data.answer == "raise":
            raise KeyError("no such thing")
        return float(self.data.answer in trace.last_reply)

    @vf.reward(weight=0.5)
    async def is_short(self, trace) -> float:
        return float(len(trace.last_reply) < 40)


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self):
        for number in range(self.config.size):
            data = SumsData(
                prompt=f"{number}?", answer="raise" if number == self.config.failing else str(number), system_prompt="n"
            )
            yield SumsTask(data, self.config.task)


__all__ = ["SumsTaskset"]
