"""Data sets, verifiers, the reward runner and curricula. Nothing here imports jax.

A data row is an `Example`; a reward is a plain callable (`rljax.tasks.callables` says what it may ask for); the
`RewardRunner` calls rewards so that one that fails costs a sample and never the run.
"""

from rljax.tasks.answers import (
    AfterMarker,
    Extractor,
    InTag,
    final_number,
    in_box,
    last_number,
    whole_completion,
    whole_number,
)
from rljax.tasks.callables import RewardInput, batch_reward, load_callable
from rljax.tasks.coevolve import CoEvolvedCurriculum, CoEvolvedTasks
from rljax.tasks.config import (
    CurriculumSource,
    Dataset,
    DataSource,
    FileData,
    FileRows,
    HubData,
    ReasoningGymData,
    RewardConfig,
    RowsData,
    UniformTasks,
    without_long_rows,
)
from rljax.tasks.curriculum import Curriculum, UniformCurriculum
from rljax.tasks.d2evo import D2EvoCurriculum, D2EvoTasks, QuestionMaker, TaggedQuestions
from rljax.tasks.difficulty import MediumCurriculum, MediumTasks, TwoStageCurriculum, TwoStageTasks
from rljax.tasks.evolving import (
    JUDGED,
    Evolving,
    Intake,
    Judging,
    Player,
    SeenGroup,
    TaskMaker,
    TaskPool,
    added_by,
    medium_share,
)
from rljax.tasks.examples import Example, Prompt, Split, decontaminate, split_answer, split_by_hash, whole_text
from rljax.tasks.failures import (
    FailedTasks,
    FailureCurriculum,
    failure_distribution,
    failure_mass,
    nearest,
)
from rljax.tasks.files import load_jsonl, load_parquet
from rljax.tasks.hub import load_hub
from rljax.tasks.judge import AnswerJudge, ChatEndpoint, FactJudge, JudgeError, PairJudge
from rljax.tasks.judge_bias import PositionBias, position_bias
from rljax.tasks.mixture import balanced, interleave, replications
from rljax.tasks.reasoning_gym import (
    ReasoningGymTask,
    ReasoningGymVerifier,
    reasoning_gym_names,
    reasoning_gym_task,
)
from rljax.tasks.rewards import FAILURES, RewardResult, RewardRunner, RewardSpec
from rljax.tasks.similarity import SIMILARITIES, TextSimilarity
from rljax.tasks.text_rewards import (
    FactCheck,
    GroundedAnswer,
    LabelWithReasoning,
    RedundantQueries,
    RepetitionPenalty,
    ToolQueries,
    UnlessDegenerate,
    foreign_share,
    most_frequent_window,
    query_redundancy,
    repeated_share,
    states_facts,
)
from rljax.tasks.verifiers import ExactMatch, LengthReward, MathVerify, NumberMatch, RegexMatch
from rljax.tasks.workers import WorkersFailed

__all__ = [
    "FAILURES",
    "JUDGED",
    "SIMILARITIES",
    "AfterMarker",
    "AnswerJudge",
    "ChatEndpoint",
    "CoEvolvedCurriculum",
    "CoEvolvedTasks",
    "Curriculum",
    "CurriculumSource",
    "D2EvoCurriculum",
    "D2EvoTasks",
    "DataSource",
    "Dataset",
    "Evolving",
    "ExactMatch",
    "Example",
    "Extractor",
    "FactCheck",
    "FactJudge",
    "FailedTasks",
    "FailureCurriculum",
    "FileData",
    "FileRows",
    "GroundedAnswer",
    "HubData",
    "InTag",
    "Intake",
    "JudgeError",
    "Judging",
    "LabelWithReasoning",
    "LengthReward",
    "MathVerify",
    "MediumCurriculum",
    "MediumTasks",
    "NumberMatch",
    "PairJudge",
    "Player",
    "PositionBias",
    "Prompt",
    "QuestionMaker",
    "ReasoningGymData",
    "ReasoningGymTask",
    "ReasoningGymVerifier",
    "RedundantQueries",
    "RegexMatch",
    "RepetitionPenalty",
    "RewardConfig",
    "RewardInput",
    "RewardResult",
    "RewardRunner",
    "RewardSpec",
    "RowsData",
    "SeenGroup",
    "Split",
    "TaggedQuestions",
    "TaskMaker",
    "TaskPool",
    "TextSimilarity",
    "ToolQueries",
    "TwoStageCurriculum",
    "TwoStageTasks",
    "UniformCurriculum",
    "UniformTasks",
    "UnlessDegenerate",
    "WorkersFailed",
    "added_by",
    "balanced",
    "batch_reward",
    "decontaminate",
    "failure_distribution",
    "failure_mass",
    "final_number",
    "foreign_share",
    "in_box",
    "interleave",
    "last_number",
    "load_callable",
    "load_hub",
    "load_jsonl",
    "load_parquet",
    "medium_share",
    "most_frequent_window",
    "nearest",
    "position_bias",
    "query_redundancy",
    "reasoning_gym_names",
    "reasoning_gym_task",
    "repeated_share",
    "replications",
    "split_answer",
    "split_by_hash",
    "states_facts",
    "whole_completion",
    "whole_number",
    "whole_text",
    "without_long_rows",
]
