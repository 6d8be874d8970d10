"""High-entropy minority tokens, arXiv 2506.01939: the gradient of the 20% of tokens of highest entropy alone.

    rljax train --config=papers/high_entropy --workdir=runs/high_entropy

Look at loss/selected_fraction and loss/entropy. Few tokens of an episode decide (which price to ask for next, whether
to answer); most copy what a tool said.
"""

from turns import turns_config

from rljax.algorithms import HighEntropy
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return turns_config(HighEntropy(group_size=8, overlong_buffer=0), size)
