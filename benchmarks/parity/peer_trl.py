"""TRL's shipped `_compute_loss` and `_generate_and_score_completions` on planted log-probs and rewards.

Runs in TRL's environment, started by `losses.py`. The trainers are subclassed without their `__init__`: the model, the
generation and the reward functions are planted, everything between them is TRL's own code.
"""

import collections
import types

import torch
from _exchange import answer
from accelerate import Accelerator
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

torch.set_default_dtype(torch.float64)


class Scores(torch.nn.Module):
    """In place of a model: the log-probs that it would give."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = logprobs


class Planted:
    """The trainers' hooks, and the attributes that their `__init__` takes over from its config."""

    def __init__(self, config, d, settings):
        self.data, self.args = d, config
        self.model = Scores(torch.tensor(d["behavior"]))
        self.ref_model = Scores(torch.tensor(d["ref"]))
        self.accelerator = Accelerator(cpu=True)
        self.beta, self.epsilon_low = config.beta, config.epsilon
        self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.num_generations = settings.get("num_generations", 2)
        self.num_iterations = config.num_iterations
        self.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        self.max_completion_length = config.max_completion_length
        for name in ("loss_type", "importance_sampling_level", "top_entropy_quantile", "off_policy_mask_threshold"):
            setattr(self, name, getattr(config, name, None))
        for name in ("scale_rewards", "multi_objective_aggregation", "normalize_advantages", "reward_clip_range"):
            setattr(self, name, getattr(config, name, None))
        self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.vllm_importance_sampling_correction = self.mask_truncated_completions = self.log_multimodal = False
        self.environment_factories = self.environments = self.tools = self.pad_to_multiple_of = None
        self.reward_funcs, self.reward_func_names, self.reward_weights = [None], ["planted"], torch.ones(1)
        self._tokenizer = types.SimpleNamespace(pad_token_id=0)
        self._metrics = {"train": collections.defaultdict(list), "eval": collections.defaultdict(list)}
        self._logs = collections.defaultdict(list) | {x: collections.defaultdict(list) for x in ("rewards", "extra")}
        self._pending_extra_logs, self._pending_metrics = {}, {}

    def _get_per_token_logps_and_entropies(self, model, *arguments, **options):
        return model.logprobs, torch.zeros_like(model.logprobs), None

    def _calculate_rewards(self, *arguments):
        return torch.tensor(self.data["rewards"])[:, None]

    def completions(self):
        """Token ids up to the last token of each row, and which of them the policy emitted."""
        mask = self.data["mask"]
        lengths = [int(row.nonzero()[0].max()) + 1 for row in mask]
        return [[1] * n for n in lengths], [row[:n].astype(int).tolist() for row, n in zip(mask, lengths)]


class GRPO(Planted, GRPOTrainer):
    def _generate(self, prompts):
        ids, tool_mask = self.completions()
        return [[1]] * len(ids), ids, tool_mask, [""] * len(ids), None, {}, None, []


class GMPO(Planted, GMPOTrainer):
    pass


class RLOO(Planted, RLOOTrainer):
    def _generate(self, prompts):
        ids, _ = self.completions()
        return [[1]] * len(ids), ids, [""] * len(ids)


TRAINERS = {"grpo": (GRPO, GRPOConfig), "gmpo": (GMPO, GMPOConfig), "rloo": (RLOO, RLOOConfig)}


def make(d, settings):
    trainer, config = TRAINERS[settings["trainer"]]
    options = dict(output_dir="unused", use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4)
    return trainer(config(**options | settings.get("config", {})), d, settings)


def loss(d, settings):
    """Loss and its gradient in the log-probs, summed over as many microbatches as `settings` say."""
    trainer, parts = make(d, settings), settings.get("microbatches", 1)
    logprobs = torch.tensor(d["logprobs"], requires_grad=True)
    mask = torch.tensor(d["mask"]).long()
    seen = mask.flip(1).cumsum(1).flip(1).clamp(max=1)  # up to the last token: what the model was shown
    ones, total = torch.ones(len(mask), 1, dtype=torch.long), 0
    for rows in torch.arange(len(mask)).chunk(parts):
        old = torch.tensor(d["old"])[rows]
        inputs = {
            "prompt_ids": ones[rows],
            "prompt_mask": ones[rows],
            "completion_ids": torch.ones_like(mask)[rows],
            "completion_mask": seen[rows],
            "tool_mask": mask[rows],
            "advantages": torch.tensor(d["row_advantages"])[rows],
            "old_per_token_logps": old,
            "ref_per_token_logps": torch.tensor(d["ref"])[rows],
            "num_items_in_batch": mask.sum(),
        }
        if settings["trainer"] == "rloo":  # knows no tool mask
            inputs |= {"completion_mask": mask[rows], "old_logps": (old * mask[rows]).sum(1)}
        total = total + trainer._compute_loss(Scores(logprobs[rows]), inputs)
    total.backward()
    return {"loss": total.detach().numpy(), "gradient": logprobs.grad.numpy()}


def advantage(d, settings):
    trainer = make(d, settings)
    found = trainer._generate_and_score_completions([{"prompt": "planted"}] * len(d["mask"]))["advantages"]
    return {"advantage": (found[:, None] * torch.tensor(d["mask"])).numpy()}


def gkd(d, settings):
    student = torch.tensor(d["student_logits"], requires_grad=True)
    labels = torch.where(torch.tensor(d["mask"]), 1, -100)
    options = {"beta": settings["beta"], "temperature": settings["temperature"]}
    value = GKDTrainer.generalized_jsd_loss(student, torch.tensor(d["teacher_logits"]), labels, **options)
    value.backward()
    return {"loss": value.detach().numpy(), "gradient": student.grad.numpy()}


if __name__ == "__main__":
    answer("trl", ("trl", "transformers", "torch"), {"loss": loss, "advantage": advantage, "gkd": gkd})
