"""Tunix: its vanilla sampler, and its RL trainer with its GRPO loss.

Job fields as in `torch_hf.py`.
"""

import protocol

job = protocol.read_job()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from tunix.generate import sampler as sampler_lib  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.models.llama3 import params as llama_params  # noqa: E402
from tunix.rl import algo_core, common, trainer  # noqa: E402
from tunix.rl.grpo.grpo_learner import GRPOConfig  # noqa: E402
from tunix.sft.peft_trainer import TrainingConfig  # noqa: E402

shape = job["model_shape"]
config = llama.ModelConfig(
    num_layers=shape["num_hidden_layers"],
    vocab_size=shape["vocab_size"],
    embed_dim=shape["hidden_size"],
    hidden_dim=shape["intermediate_size"],
    num_heads=shape["num_attention_heads"],
    head_dim=shape["head_dim"],
    num_kv_heads=shape["num_key_value_heads"],
    rope_theta=int(shape["rope_theta"]),
    norm_eps=shape["rms_norm_eps"],
)
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = llama_params.create_model_from_safe_tensors(job["model"], config, mesh, dtype=jnp.dtype(job["dtype"]))


class Ids:
    """A tokenizer whose text is token ids; its end token is outside the vocabulary, so nothing stops.

    The sampler puts `bos_id` first unless it is there: prompts of a job all start with it.
    """

    def encode(self, text, **_):
        return [int(t) for t in text.split()]

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return 1

    def eos_id(self):
        return shape["vocab_size"] + 1

    def pad_id(self):
        return 0


def make_generate(prompts, new_tokens):
    """Its sampler knows no groups: every prompt is given `samples` times, as its GRPO learner does."""
    length = len(prompts[0])
    cache = sampler_lib.CacheConfig(
        cache_size=length + new_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = sampler_lib.Sampler(model, Ids(), cache)
    texts = [" ".join(map(str, p)) for p in prompts for _ in range(job["samples"])]
    calls = iter(range(10**6))

    def generate():
        out = sampler(
            texts,
            max_generation_steps=new_tokens,
            max_prompt_length=length,
            temperature=1.0,
            top_p=1.0,
            seed=next(calls),
        )
        return {"new_tokens": sum(len(t) for t in out.tokens)}

    return generate


def make_step():
    """One call of its jitted train step: forward, GRPO loss with token mean and no KL, backward, clipping, Adam."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(job["learning_rate"]))
    rl_trainer = trainer.Trainer(
        model, optimizer, TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9), lambda: {}
    )
    grpo = GRPOConfig(num_generations=len(job["rows"]), beta=0.0, epsilon=job["clip"], loss_agg_mode="token-mean")
    grpo.temperature = 1.0  # its learner copies it here from the rollout's config
    rl_trainer.with_loss_fn(
        lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
            model, train_example, algo_config, pad_id=0, eos_id=shape["vocab_size"] + 1
        ),
        has_aux=True,
    )
    rl_trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": grpo})
    rows, prompt = np.array(job["rows"], np.int32), job["prompt_length"]
    completions = rows[:, prompt:]
    example = common.TrainExample(
        prompt_ids=jnp.asarray(rows[:, :prompt]),
        prompt_mask=jnp.ones((len(rows), prompt), bool),
        completion_ids=jnp.asarray(completions),
        completion_mask=jnp.ones(completions.shape, bool),
        advantages=jnp.asarray(job["advantages"], jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=None,  # on-policy: the old log-probs are the first ones
    )
    train_step, _ = rl_trainer.jit_train_and_eval_step()

    def step():
        loss, _, norm = train_step(example)
        jax.block_until_ready(jax.tree.leaves(rl_trainer.optimizer.opt_state))
        return {"loss": float(loss), "grad_norm": float(norm)}

    return step


with jax.set_mesh(mesh):
    tasks = {}
    if "prompts" in job:
        tasks["rollout"] = make_generate(job["prompts"], job["new_tokens"])
    if "prefill_prompts" in job:
        tasks["prefill"] = make_generate(job["prefill_prompts"], 1)
    if "rows" in job:
        tasks["step"] = make_step()
    protocol.serve(tasks, {"jax": jax.__version__})
