"""The critic: what its values read, that they learn, and that its state survives a reload exactly."""

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.batching import evaluate, make_batches
from learner.config import LearnerConfig
from learner.critic import ValueModel
from learner.engine import ensure_process_group
from learner.policy import PolicyLearner, explained_variance
from learner.samples import Samples, ragged

CPU = torch.device("cpu")
GAE = {"device": "cpu", "advantage": "gae", "loss": "ppo_clip", "epochs": 2, "minibatches": 2, "lr": 1e-3}


def random_values(model, table, packing):
    """Values of a table's response tokens with a random head, and the model that gave them."""
    cfg = LearnerConfig(packing=packing, pack_length=24, micro_batch_tokens=48, device="cpu")
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    values = ValueModel(network.get_decoder(), packing=packing)
    torch.manual_seed(0)
    torch.nn.init.normal_(values.head.weight, std=0.1)
    torch.nn.init.constant_(values.head.bias, 0.3)
    samples = Samples.from_table(table)
    ensure_process_group(CPU)
    return evaluate(values, make_batches(samples.groups, cfg), samples.tokens, CPU, 1)[0], values


@pytest.mark.parametrize("packing", [True, False])
def test_values_are_read_before_each_token(tiny_model, uneven_table, packing):
    """Each value by a forward pass over the prompt and the tokens before it, and nothing else."""
    actual, model = random_values(tiny_model, uneven_table, packing)
    expected = []
    prompts, responses = ragged(uneven_table, "prompt_ids"), ragged(uneven_table, "response_ids")
    for prompt, response in zip(prompts, responses, strict=True):
        for t in range(len(response)):
            ids = torch.tensor([[*prompt.tolist(), *response[:t].tolist()]])
            with torch.no_grad():
                state = model.body(input_ids=ids).last_hidden_state[0, -1]
                expected.append(float(state @ model.head.weight[0] + model.head.bias[0]))
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def ending_with(table, rewards):
    """The table with one reward at each response's end."""
    lengths = [len(r) for r in table["response_ids"].to_pylist()]
    rows = [[0.0] * (n - 1) + [float(r)] for n, r in zip(lengths, rewards, strict=True)]
    place = table.column_names.index("token_rewards")
    return table.set_column(place, "token_rewards", pa.array(rows, pa.list_(pa.float32())))


def test_critic_learns_what_is_still_to_come(tiny_model, uneven_table):
    """With lambda = 1 the targets are the returns: here a number that the prompt tells."""
    rewards = [float(int(g[-1]) % 2) for g in uneven_table["group_id"].to_pylist()]
    table = ending_with(uneven_table, rewards)
    cfg = LearnerConfig(**GAE, kl_coef=0, gae_lambda=1.0, critic={"lr": 3e-3, "clip": None})
    learner = PolicyLearner(str(tiny_model), cfg, model_dtype="float32")
    history = [learner.train_step(table, step) for step in range(12)]
    assert history[0]["critic_explained"] == pytest.approx(0, abs=1e-6), "it begins with zeros"
    assert history[0]["return_mean"] == pytest.approx(history[-1]["return_mean"])
    assert history[-1]["critic_explained"] > 0.9
    assert history[-1]["critic_loss"] < 0.1 * history[0]["critic_loss"]
    assert history[-1]["advantage_std"] < 0.5 * history[0]["advantage_std"]


def test_first_loss_of_a_critic_that_knows_nothing(tiny_model, uneven_table):
    """All values are zero: half the mean square of the returns."""
    table = ending_with(uneven_table, range(len(uneven_table)))
    cfg = LearnerConfig(device="cpu", advantage="gae", kl_coef=0, gae_lambda=1.0)
    metrics = PolicyLearner(str(tiny_model), cfg, model_dtype="float32").train_step(table, 0)
    lengths = [len(r) for r in table["response_ids"].to_pylist()]
    squares = sum(n * r * r for r, n in enumerate(lengths))
    assert metrics["critic_loss"] == pytest.approx(0.5 * squares / sum(lengths), rel=1e-5)
    assert metrics["critic_lr"] == pytest.approx(1e-5)


def test_adapters_of_the_policy_are_none_of_the_critic(tiny_model, uneven_table):
    cfg = LearnerConfig(**GAE, kl_coef=0.1, lora={"rank": 2})
    learner = PolicyLearner(str(tiny_model), cfg, model_dtype="float32")
    assert learner.critic is not None
    assert all(p.requires_grad for p in learner.critic.trainable.module.parameters())
    assert not any("lora" in name for name, _ in learner.critic.trainable.module.named_parameters())
    assert learner.train_step(uneven_table, 0)["critic_grad_norm"] > 0


def test_critic_and_kl_weight_continue_bit_for_bit(tiny_model, uneven_table, tmp_path):
    cfg = LearnerConfig(**GAE, kl_coef=0.1, kl_target=1e-3, critic={"lr": 1e-3})
    learner = PolicyLearner(str(tiny_model), cfg, model_dtype="float32")
    for step in range(2):
        learner.train_step(uneven_table, step)
    learner.save(tmp_path / "state")
    expected = [learner.train_step(uneven_table, step) for step in (2, 3)]
    again = PolicyLearner(str(tiny_model), cfg, model_dtype="float32")
    again.load(tmp_path / "state")
    actual = [again.train_step(uneven_table, step) for step in (2, 3)]
    for a, b in zip(actual, expected, strict=True):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {
            k: v for k, v in b.items() if "seconds" not in k
        }
    assert expected[0]["kl_coef"] != 0.1


def test_a_checkpoint_without_a_critic_is_refused(tiny_model, tmp_path):
    plain = PolicyLearner(str(tiny_model), LearnerConfig(kl_coef=0, device="cpu"), model_dtype="float32")
    plain.save(tmp_path)
    learner = PolicyLearner(str(tiny_model), LearnerConfig(**GAE, kl_coef=0), model_dtype="float32")
    with pytest.raises(FileNotFoundError, match="critic holds no engine state"):
        learner.load(tmp_path)


def test_explained_variance():
    targets = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(targets, targets) == 1.0
    assert explained_variance(torch.full((4,), 7.0), targets) == 0.0
    assert explained_variance(-targets, targets) == pytest.approx(-3.0)
    assert explained_variance(targets, torch.ones(4)) == 0.0
