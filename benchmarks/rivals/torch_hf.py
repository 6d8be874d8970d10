"""Hugging Face `generate` and a policy-gradient step in PyTorch.

Job fields: `model`, `threads`, `device`, `dtype`, and of the rollout `prompts`, `samples`, `new_tokens`,
`prefill_prompts`; of the step `rows`, `prompt_length`, `advantages`, `clip`, `learning_rate`.
"""

import functools

import protocol
import torch
from transformers import AutoModelForCausalLM

job = protocol.read_job()
device = job.get("device", "cpu")
if device == "cpu":
    torch.set_num_threads(job["threads"])
kept = job.get("param_dtype", job["dtype"])  # float32 weights are trained under autocast where `dtype` is shorter
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, kept)).to(device).eval()
model.generation_config.eos_token_id = None


def finished():
    if device != "cpu":
        torch.cuda.synchronize()


def generate(prompts, new_tokens):
    """Every prompt `samples` times, plain sampling from the full distribution, no stop token."""
    ids = torch.tensor(prompts, device=device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=job["samples"],
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
    finished()
    return {"new_tokens": out.shape[0] * (out.shape[1] - ids.shape[1])}


def make_step():
    """Token mean of the clipped surrogate, gradient clipping, fused Adam: `step(keep)` computes the logits of all
    positions, or with `keep` of the completions alone, as TRL does."""
    rows = torch.tensor(job["rows"], device=device)
    advantages = torch.tensor(job["advantages"], device=device)[:, None]
    prompt, clip = job["prompt_length"], job["clip"]
    targets = rows[:, prompt:]
    optimizer = torch.optim.Adam(model.parameters(), lr=job["learning_rate"], fused=True)

    def step(keep):
        model.train()
        with torch.autocast(device, getattr(torch, job["dtype"]), enabled=job["dtype"] != kept):
            if keep:
                logits = model(input_ids=rows, use_cache=False, logits_to_keep=targets.shape[1] + 1).logits[:, :-1]
            else:
                logits = model(input_ids=rows, use_cache=False).logits[:, prompt - 1 : -1]
        logits = logits.float()
        logprobs = logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(-1)
        ratio = torch.exp(logprobs - logprobs.detach())  # on-policy: the old log-probs are the first ones
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        loss = -surrogate.sum() / targets.numel()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finished()
        return {"loss": loss.item(), "grad_norm": norm.item()}

    return step


tasks = {}
if "prompts" in job:
    tasks["rollout"] = lambda: generate(job["prompts"], job["new_tokens"])
if "prefill_prompts" in job:
    tasks["prefill"] = lambda: generate(job["prefill_prompts"], 1)
if "rows" in job:
    step = make_step()
    tasks["step"] = functools.partial(step, keep=True)
    tasks["step_all_logits"] = functools.partial(step, keep=False)
protocol.serve(tasks, {"torch": torch.__version__})
