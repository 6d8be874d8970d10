"""verl's registered advantage estimators and policy losses, called as its trainer calls them.

Runs in verl's environment, started by `losses.py`.
"""

import torch
from _exchange import answer
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

torch.set_default_dtype(torch.float64)


def advantage(d, settings):
    """`settings`: the estimator's registered name, and `with_values` for those that take a critic's."""
    mask = torch.tensor(d["mask"]).double()
    arguments = {"token_level_rewards": torch.tensor(d["token_rewards"]), "response_mask": mask}
    if settings.get("with_values"):
        arguments |= {"values": torch.tensor(d["values"]), **settings["with_values"]}
    else:
        arguments |= {"config": AlgoConfig(), **settings.get("options", {})}
        if settings["name"] != "reinforce_plus_plus":
            arguments["index"] = d["groups"]
    found, returns = core_algos.get_adv_estimator_fn(settings["name"])(**arguments)
    return {"advantage": (found * mask).numpy(), "returns": (returns * mask).numpy()}


def loss(d, settings):
    """Loss of a minibatch and its gradient in the log-probs."""
    config = ActorConfig(strategy="fsdp", rollout_n=4, use_dynamic_bsz=True, **settings.get("config", {}))
    logprobs = torch.tensor(d["logprobs"], requires_grad=True)
    value, _ = core_algos.get_policy_loss_fn(settings["name"])(
        old_log_prob=torch.tensor(d["old"]),
        log_prob=logprobs,
        advantages=torch.tensor(d["advantages"]),
        response_mask=torch.tensor(d["mask"]).double(),
        loss_agg_mode=settings.get("aggregation", "token-mean"),
        config=config,
    )
    value.backward()
    return {"loss": value.detach().numpy(), "gradient": logprobs.grad.numpy()}


def value_loss(d, settings):
    """A critic's clipped loss and its gradient in the predictions."""
    predicted = torch.tensor(d["predicted"], requires_grad=True)
    mask = torch.tensor(d["mask"]).double()
    returns, values = torch.tensor(d["returns"]), torch.tensor(d["values"])
    value, _ = core_algos.compute_value_loss(predicted, returns, values, mask, cliprange_value=settings["clip"])
    value.backward()
    return {"loss": value.detach().numpy(), "gradient": predicted.grad.numpy()}


if __name__ == "__main__":
    kinds = {"advantage": advantage, "loss": loss, "value_loss": value_loss}
    answer("verl", ("verl", "torch", "tensordict"), kinds)
