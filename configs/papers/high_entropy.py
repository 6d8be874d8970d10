"""High-entropy minority tokens, arXiv 2506.01939: the gradient of the 20% of tokens of highest entropy alone.

    python launch/train.py --config=configs/papers/high_entropy.py --workdir=runs/high_entropy

Look at loss/entropy against dapo.py: the tokens left out keep theirs.
"""

from spelling import spelling_config

from rljax.algorithms import HighEntropy
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(HighEntropy(group_size=8, overlong_buffer=0), size, minibatches=4)
