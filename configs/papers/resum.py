"""ReSum, arXiv 2606.13316: solutions branch at summaries; with and without one they are contrasted.

    rljax train --config=papers/resum --workdir=runs/resum

Look at rollout/forced_tokens, given to forks. A summary is a start over here: what follows the last ` =` is the answer,
and the demonstrations start over after wrong beginnings, so that there is a contrast to learn from.
"""

from spelling import after_equals, spelling_config, with_restarts

from rljax.algorithms import ReSum
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(
        ReSum(chains=4, rounds=1, inject=(" =",), detect=(" =",), reward_if_correct=True),
        size,
        max_new_tokens=16,
        extract=after_equals,
        minibatches=4,
        demonstrations=with_restarts,
    )
