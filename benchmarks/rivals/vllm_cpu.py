"""vLLM on the CPU, in this process, eager. Job fields as in `torch_hf.py`."""

import os

import protocol

if __name__ == "__main__":
    job = protocol.read_job()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import vllm

    longest = max(len(job["prompts"][0]) + job["new_tokens"], len(job["prefill_prompts"][0]) + 1)
    rows = len(job["prompts"]) * job["samples"]
    llm = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=rows,
        max_num_batched_tokens=max(2048, longest * 4),
        enforce_eager=job.get("vllm_eager", True),
    )

    def generate(prompts, new_tokens):
        """Prefix caching stays on, so that samples of a prompt share it; it is emptied between calls, as after an
        update of the weights."""
        llm.reset_prefix_cache()
        params = vllm.SamplingParams(
            n=job["samples"], temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        out = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return {"new_tokens": sum(len(c.token_ids) for r in out for c in r.outputs)}

    protocol.serve(
        {
            "rollout": lambda: generate(job["prompts"], job["new_tokens"]),
            "prefill": lambda: generate(job["prefill_prompts"], 1),
        },
        {"vllm": vllm.__version__},
    )
