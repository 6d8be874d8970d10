"""TRL's losses of preferences on planted log-probs and rewards, as the numbers that a test holds ours against.

    PYTHON_WITH_TRL benchmarks/parity/preferences.py --json=tests/golden/preferences.json

Runs in an environment with trl 1.16.0 (that of `losses.py` has it). The trainers are made without their `__init__`;
their `_compute_loss` and `compute_loss` are TRL's own, in float64, given models that answer with planted numbers.
"""

import argparse
import collections
import json
import types
from pathlib import Path

import numpy as np

PAIRS = 4
LENGTH = 6

DPO = {
    "DPO": {"loss_type": "sigmoid", "beta": 0.1},
    "IPO": {"loss_type": "ipo", "beta": 0.1},
}
SIMPO = {"SimPO": {"beta": 2.0, "gamma": 1.0}}
KTO = {"KTO": {"beta": 0.1, "desirable": 1.0, "undesirable": 1.0}, "KTO weighted": {"beta": 0.5, "desirable": 1.33}}
REWARD = {"BradleyTerry": {"center": None}, "BradleyTerry centered": {"center": 0.01}}


def make_data() -> dict[str, np.ndarray]:
    """First the preferred completion of every pair, then the others, then as many of other prompts."""
    rng = np.random.default_rng(0)
    shape = (4 * PAIRS, LENGTH)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, shape[0])[:, None]
    logprobs = np.where(mask, -rng.exponential(size=shape), 0)
    ref = np.where(mask, logprobs + 0.5 * rng.normal(size=shape) - 0.1, 0)
    return {"mask": mask, "logprobs": logprobs, "ref": ref, "rewards": rng.normal(size=2 * PAIRS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the file to write")
    path = Path(parser.parse_args().json)

    import torch
    import transformers
    import trl
    from accelerate import Accelerator

    torch.set_default_dtype(torch.float64)
    data = make_data()
    found = {}
    accelerator = Accelerator(cpu=True)
    for name, settings in DPO.items():
        found[name] = _gradient(data["logprobs"][: 2 * PAIRS], lambda x, s=settings: _dpo(x, data, s, accelerator))
    for name, settings in SIMPO.items():
        found[name] = _gradient(data["logprobs"][: 2 * PAIRS], lambda x, s=settings: _simpo(x, data, s, accelerator))
    for name, settings in KTO.items():
        found[name] = _gradient(data["logprobs"], lambda x, s=settings: _kto(x, data, s, accelerator))
    for name, settings in REWARD.items():
        found[name] = _gradient(data["rewards"], lambda x, s=settings: _reward(x, s, accelerator))

    text = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "data": {key: value.tolist() for key, value in data.items()},
        "settings": DPO | SIMPO | KTO | REWARD,
        "found": found,
    }
    path.write_text(json.dumps(text) + "\n")


def _gradient(values, loss_of) -> dict:
    import torch

    given = torch.tensor(values, requires_grad=True)
    loss = loss_of(given)
    loss.backward()
    return {"loss": loss.item(), "gradient": given.grad.tolist()}


class _Planted:
    """In place of a model: what it would answer. The log-prob of a row's first token is none's, so the rows lead."""

    is_gradient_checkpointing = False
    training = True

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, **inputs):
        return self.answer(inputs)


def _outputs(logprobs):
    import torch

    zeros = torch.zeros_like(logprobs)
    return types.SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)


def _base(trainer, accelerator, **fields):
    # What `__init__` would have set, as far as the loss asks for it.
    trainer.accelerator = accelerator
    trainer.args = types.SimpleNamespace(gradient_checkpointing_kwargs=None, center_rewards_coefficient=None)
    trainer._metrics = {"train": collections.defaultdict(list), "eval": collections.defaultdict(list)}
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    trainer.model = _Planted(None)
    for name, value in fields.items():
        setattr(trainer, name, value)
    return trainer


def _tokens(mask):
    """A prompt of one token before each completion."""
    import torch

    rows = torch.tensor(mask).long()
    with_prompt = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], dim=1)
    return torch.ones_like(with_prompt), with_prompt


def _dpo(logprobs, d, settings, accelerator):
    import torch
    from trl import DPOTrainer

    count = 2 * PAIRS
    trainer = _base(
        object.__new__(DPOTrainer),
        accelerator,
        beta=settings["beta"],
        loss_types=[settings["loss_type"]],
        loss_weights=[1.0],
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=False,
        use_weighting=False,
        aux_loss_enabled=False,
        ref_model=_Planted(lambda inputs: _outputs(torch.tensor(d["ref"][:count]))),
    )
    ids, mask = _tokens(d["mask"][:count])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    return trainer._compute_loss(_Planted(lambda inputs: _outputs(logprobs)), inputs, False)


def _simpo(logprobs, d, settings, accelerator):
    import torch
    from trl.experimental.cpo import CPOTrainer

    trainer = _base(
        object.__new__(CPOTrainer),
        accelerator,
        beta=settings["beta"],
        simpo_gamma=settings["gamma"],
        loss_type="simpo",
        label_smoothing=0.0,
        alpha=0.0,
    )
    # `average_log_prob` is what the trainer makes of tokens for this loss.
    counts = torch.tensor(d["mask"][: 2 * PAIRS]).sum(1)
    preferred, other = (logprobs.sum(1) / counts).chunk(2)
    return trainer.cpo_loss(preferred, other)[0].mean()


def _kto(logprobs, d, settings, accelerator):
    import torch
    from trl import KTOTrainer

    count = 2 * PAIRS
    own = {"desirable": 1.0, "undesirable": 1.0} | settings

    def answers(values):
        def answer(inputs):
            # Rows of other prompts are asked for by themselves.
            return _outputs(values[count:] if inputs["input_ids"][0, 0] == 2 else values[:count])

        return _Planted(answer)

    trainer = _base(
        object.__new__(KTOTrainer),
        accelerator,
        beta=own["beta"],
        desirable_weight=own["desirable"],
        undesirable_weight=own["undesirable"],
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        ref_model=answers(torch.tensor(d["ref"])),
    )
    ids, mask = _tokens(d["mask"][:count])
    other_ids, other_mask = _tokens(d["mask"][count:])
    ones = torch.ones_like(ids)
    inputs = {
        "input_ids": ids,
        "attention_mask": ones,
        "completion_mask": mask,
        "label": torch.arange(count) < PAIRS,
        "KL_input_ids": 2 * other_ids,
        "KL_attention_mask": ones,
        "KL_completion_mask": other_mask,
    }
    return trainer._compute_loss(answers(logprobs), inputs, False)


def _reward(rewards, settings, accelerator):
    import torch
    from trl import RewardTrainer

    trainer = _base(object.__new__(RewardTrainer), accelerator)
    trainer.args.center_rewards_coefficient = settings["center"]
    outputs = types.SimpleNamespace(logits=rewards[:, None])
    inputs = {"attention_mask": torch.ones(2 * PAIRS, LENGTH)}
    return trainer.compute_loss(_Planted(lambda inputs: outputs), inputs)


if __name__ == "__main__":
    main()
