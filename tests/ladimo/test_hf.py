"""transformers' view of a converted checkpoint is the engine's model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ladimo.checkpoint import load_model, read_config, read_policies, write_policy
from ladimo.hf import LadimoLlamaConfig, LadimoLlamaForCausalLM
from ladimo.model.inputs import StepInputs
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import EOS_ID, PHI2, VOCAB_SIZE, make_dense, make_moe, make_nested
from tests.ladimo.stepping import Stepper, make_tables

IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))


def ours(directory: Path) -> MoeTransformer:
    return load_model(directory, torch.float32, torch.device("cpu"))


def theirs(directory: Path) -> LadimoLlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model, LadimoLlamaForCausalLM)
    return model


@torch.no_grad()
def logits_under(model: MoeTransformer, policy: RoutingPolicy) -> Tensor:
    out = model(StepInputs.whole_sequences(IDS), None, make_tables(model, [policy]))
    logits: Tensor = out.logits.view(*IDS.shape, -1)
    return logits


FRESH = """
import sys
from pathlib import Path
import torch
import ladimo.cli, server.launch
from ladimo.auto import load_tokenizer
from ladimo.checkpoint import load_model
from ladimo.model.inputs import RoutingTables, StepInputs
for directory in map(Path, sys.argv[1:]):
    load_tokenizer(directory)
    model = load_model(directory, torch.float32, torch.device("cpu"))
    tables = RoutingTables.empty(2, model.config.num_hidden_layers, model.config.max_num_experts, "cpu")
    model(StepInputs.whole_sequences(torch.zeros(1, 4, dtype=torch.int64)), None, tables)
heavy = ("transformers.modeling_utils", "torch._dynamo", "sympy", "triton", "ladimo.model.kernels.experts")
print([name for name in heavy if name in sys.modules])
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__, type(AutoConfig.for_model("ladimo_llama")).__name__)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_importing_the_package_is_enough(moe_dir: Path, dense_dir: Path) -> None:
    """In a fresh interpreter. The modelling code of transformers, torch's compiler and Triton are slow to import, so no server
    or conversion on a CPU loads them: the first two come with the first configuration. Nothing of the checkpoint is
    executed."""
    command = [sys.executable, "-c", FRESH, str(moe_dir), str(dense_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "LadimoLlamaConfig LadimoLlamaConfig",
        "LadimoLlamaForCausalLM",
    ]
    assert not list(moe_dir.glob("*.py"))


def test_a_configuration_made_by_hand_is_known_to_the_auto_classes(moe_dir: Path) -> None:
    config = LadimoLlamaConfig(**AutoConfig.from_pretrained(moe_dir).to_dict())
    assert config.moe_layers == AutoConfig.from_pretrained(moe_dir).moe_layers
    assert isinstance(AutoModelForCausalLM.from_config(config), LadimoLlamaForCausalLM)


@torch.no_grad()
def test_logits_under_policy_full(moe_dir: Path) -> None:
    model = ours(moe_dir)
    expected = logits_under(model, read_policies(moe_dir, model.config)["full"])
    assert expected.abs().max() > 1
    assert (theirs(moe_dir)(IDS).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        ({"tie_word_embeddings": True}, {"score_norm_top_k": 2}),
        ({"attention_bias": True, "head_dim": 16}, {"score_function": "sigmoid"}),
        ({}, {"expert_weight": "one"}),
    ],
)
@torch.no_grad()
def test_logits_of_other_shapes(tmp_path: Path, config: dict[str, Any], layer: dict[str, Any]) -> None:
    """`full` runs each layer's own number of experts; experts of weight one are summed, not averaged."""
    directory = make_moe(tmp_path, layer=layer, **config)
    model = ours(directory)
    renormalize = layer.get("expert_weight") != "one"
    full = tuple(None if entry is None else LayerRule(2, renormalize=renormalize) for entry in model.config.layers)
    expected = logits_under(model, RoutingPolicy("full", "", full))
    assert (theirs(directory)(IDS).logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_set_policy(moe_dir: Path) -> None:
    model, reference = ours(moe_dir), theirs(moe_dir)
    masked = RoutingPolicy("masked", "", (LayerRule(2, experts=(1, 2)), None, LayerRule(1, experts=(0, 3))))
    seen = []
    for policy in [*read_policies(moe_dir, model.config).values(), masked]:
        reference.set_policy(policy.layers)
        seen.append(reference(IDS).logits)
        assert (seen[-1] - logits_under(model, policy)).abs().max() < 1e-4
    assert all((first - second).abs().max() > 1e-2 for first, second in zip(seen, seen[1:], strict=False))


@torch.no_grad()
def test_a_policy_named_at_loading(moe_dir: Path, tmp_path: Path) -> None:
    """As evaluation harnesses load models: through the Auto class, with options only."""
    reference = theirs(moe_dir)
    reference.set_policy(read_policies(moe_dir, ours(moe_dir).config)["fast"].layers)
    named = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32, policy="fast")
    assert torch.equal(named(IDS).logits, reference(IDS).logits)
    named.save_pretrained(tmp_path)  # the name is not kept: the copy has no policies
    assert "policy" not in AutoConfig.from_pretrained(tmp_path).to_dict()
    with pytest.raises(ValueError, match="has no policy 'slow'"):
        AutoModelForCausalLM.from_pretrained(moe_dir, policy="slow")


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ([LayerRule(1), None], "2 entries"),
        ([LayerRule(1), LayerRule(1), LayerRule(1)], r"layers\[1\]"),
        ([LayerRule(1), None, None], r"layers\[2\]"),
        ([LayerRule(1), None, LayerRule(5)], r"layers\[2\].top_k"),
        ([LayerRule(1, experts=(4,)), None, LayerRule(1)], r"layers\[0\].experts"),
    ],
)
@torch.no_grad()
def test_set_policy_refuses_what_does_not_fit(moe_dir: Path, rules: list[LayerRule | None], named: str) -> None:
    reference = theirs(moe_dir)
    before = reference(IDS).logits
    with pytest.raises(ValueError, match=named):
        reference.set_policy(rules)
    assert torch.equal(reference(IDS).logits, before)


def test_generate_is_our_greedy_decode(moe_dir: Path) -> None:
    """transformers' generation with its own cache against ours through paged blocks, under three policies."""
    model, reference = ours(moe_dir), theirs(moe_dir)
    answers = []
    for name in ("full", "balanced", "fast"):
        policy = read_policies(moe_dir, model.config)[name]
        reference.set_policy(policy.layers)
        prompt = IDS[:1, :9]
        generated = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=EOS_ID
        )
        answers.append(generated[0, 9:].tolist())
        assert answers[-1] == Stepper(model, make_tables(model, [policy])).greedy(prompt[0].tolist(), 24, stop=EOS_ID)
    assert answers[0] != answers[2]


@torch.no_grad()
def test_save_and_load_again(moe_dir: Path, tmp_path: Path) -> None:
    """transformers' own saving keeps the checkpoint readable by both."""
    reference = theirs(moe_dir)
    reference.save_pretrained(tmp_path)
    again = theirs(tmp_path)
    assert isinstance(again, LadimoLlamaForCausalLM)
    expected = reference(IDS).logits
    assert torch.equal(again(IDS).logits, expected)
    model = ours(tmp_path)
    full = read_policies(moe_dir, model.config)["full"]
    assert (logits_under(model, full) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_every_weight_comes_from_the_checkpoint(moe_dir: Path) -> None:
    """Nothing missing, nothing unexpected, nothing newly initialised."""
    _, info = AutoModelForCausalLM.from_pretrained(moe_dir, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_fresh_model_has_no_empty_experts(moe_dir: Path) -> None:
    """Built from its configuration alone, the model initialises its experts as it does other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LadimoLlamaForCausalLM(AutoConfig.from_pretrained(moe_dir))
    for name, parameter in model.named_parameters():
        if "experts" in name:
            assert 0.15 < parameter.std() < 0.25, name


@torch.no_grad()
def test_training_mode_reaches_experts_and_router(moe_dir: Path) -> None:
    """The transformers model can be trained further: gradients arrive everywhere that ran."""
    reference = theirs(moe_dir)
    with torch.enable_grad():
        reference(IDS, labels=IDS).loss.backward()
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        gradient = reference.get_parameter(f"model.layers.0.mlp.{name}").grad
        assert gradient is not None
        assert gradient.abs().max() > 0


def test_a_nested_checkpoint_is_read_whole(tmp_path: Path) -> None:
    """Under `full` it is a model like any other. What is saved again claims no planes."""
    nested = make_nested(tmp_path / "nested", tie_word_embeddings=True)
    model, info = AutoModelForCausalLM.from_pretrained(nested, output_loading_info=True, policy="full")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    rules = read_policies(nested, read_config(nested))["fast"].layers
    with pytest.raises(ValueError, match=r"loaded with whole weights only; .* from_pretrained\(MODEL, policy=NAME\)"):
        model.set_policy(rules)
    model.save_pretrained(tmp_path / "again")
    assert not read_config(tmp_path / "again").nested_bits


@torch.no_grad()
@pytest.mark.parametrize(
    ("top_bits", "fields"),
    [
        (16, {"tie_word_embeddings": True}),
        (16, {"model_type": "qwen3", "head_dim": 16}),
        (8, {"tie_word_embeddings": True}),
        (8, {"model_type": "qwen2", "dense_layers": ()}),
        (16, PHI2),
        (8, PHI2),
    ],
    ids=["tied", "norms of heads", "planes, tied", "planes", "no gate", "planes, no gate"],
)
def test_policies_of_bits_run_as_in_our_network(top_bits: int, fields: dict[str, Any], tmp_path: Path) -> None:
    """Also those that refine. Planes need no whole weights, and nothing is reported missing."""
    nested = make_nested(tmp_path / "nested", top_bits=top_bits, **fields)
    policies = read_policies(nested, read_config(nested))
    refined = replace(policies["fast"], name="refined", head_refine=2.0)
    if top_bits == 16:
        refined = replace(refined, layers=tuple(rule and replace(rule, refine=1.5) for rule in refined.layers))
    write_policy(nested, refined)
    model, info = AutoModelForCausalLM.from_pretrained(nested, dtype=torch.float32, output_loading_info=True, policy="balanced")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    own = load_model(nested, torch.float32, torch.device("cpu"))
    seen = []
    for policy in (*policies.values(), refined):
        model.set_policy(policy.layers, policy.head_bits, policy.head_refine)
        tables = make_tables(own, [policy])
        expected = own(StepInputs.whole_sequences(IDS), None, tables).logits
        seen.append(model(IDS).logits.flatten(0, 1))
        torch.testing.assert_close(seen[-1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[0], seen[-1], atol=1e-2)
    again = AutoModelForCausalLM.from_pretrained(nested, dtype=torch.float32, policy="refined")
    torch.testing.assert_close(again(IDS).logits.flatten(0, 1), seen[-1])
    with pytest.raises(ValueError, match="is not saved again"):
        model.save_pretrained(tmp_path / "again")


@torch.no_grad()
def test_planes_alone_run_under_full(tmp_path: Path) -> None:
    """Which reads 8 bits. Generation uses transformers' cache."""
    planes = make_nested(tmp_path / "planes", top_bits=8)
    model = AutoModelForCausalLM.from_pretrained(planes, dtype=torch.float32)
    own = load_model(planes, torch.float32, torch.device("cpu"))
    tables = make_tables(own, [read_policies(planes, own.config)["full"]])
    expected = own(StepInputs.whole_sequences(IDS), None, tables).logits
    torch.testing.assert_close(model(IDS).logits.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    tokens = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)[0]
    assert len(tokens) > IDS.shape[1]


def test_tokenizer_comes_along(moe_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(moe_dir)
    text = "def f(x):\n    return 'ä✓'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == EOS_ID


def test_dense_checkpoint_is_untouched(tmp_path: Path) -> None:
    """A plain LLaMA directory still loads as transformers' own class."""
    assert type(AutoModelForCausalLM.from_pretrained(make_dense(tmp_path))).__name__ == "LlamaForCausalLM"
