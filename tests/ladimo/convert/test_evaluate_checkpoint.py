"""Perplexity against transformers, variants against the real model, `evaluate` and `profile` on finished checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import POLICIES, read_config, read_frontier, read_json, read_policies, write_policy
from ladimo.convert.data.calibration import Encoder, evaluation_blocks
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.reprofile import reprofile
from ladimo.hf import LadimoLlamaForCausalLM
from ladimo.policy import RoutingPolicy
from tests.ladimo.convert.conftest import Made, make_text

KEYS = [
    "policy",
    "version",
    "perplexity",
    "perplexity_ratio",
    "active_parameters_ratio",
    "decode_bytes_ratio",
    "prefill_operations_ratio",
    "batch_bytes_ratio",
    "experts_per_token",
    "next_token_agreement",
    "kl",
]


def blocks_of(directory: Path, text: Path, tokens: int) -> torch.Tensor:
    return evaluation_blocks(Encoder(directory, read_config(directory)), text, tokens)


def test_dense_perplexity_is_transformers_loss(made: Made) -> None:
    result = evaluate_checkpoint(str(made.dense), made.text, tokens=600)
    blocks = blocks_of(made.dense, made.text, 600)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(made.dense)(blocks, labels=blocks).loss
    assert result["dense"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert result["tokens"] == 620
    (entry,) = result["policies"]
    assert list(entry) == KEYS
    assert entry["policy"] == "full"
    assert entry["perplexity"] == result["dense"]["perplexity"]
    assert (entry["perplexity_ratio"], entry["active_parameters_ratio"], entry["next_token_agreement"]) == (1, 1, 1)
    assert (entry["decode_bytes_ratio"], entry["prefill_operations_ratio"], entry["batch_bytes_ratio"]) == (1, 1, 1)
    assert entry["kl"] == pytest.approx(0, abs=1e-9)
    assert entry["experts_per_token"] == [None, None, None]


def test_every_policy_agrees_with_transformers(made: Made) -> None:
    """The shared streaming pass gives what running the whole model under each policy gives."""
    result = evaluate_checkpoint(str(made.out), made.text, tokens=600)
    blocks = blocks_of(made.dense, made.text, 600)
    targets = blocks[:, 1:].flatten()
    dense, moe = (AutoModelForCausalLM.from_pretrained(path) for path in (made.dense, made.out))
    assert isinstance(moe, LadimoLlamaForCausalLM)
    config = read_config(made.out)
    policies = read_policies(made.out, config)
    assert [entry["policy"] for entry in result["policies"]] == list(policies)
    with torch.no_grad():
        reference = dense(blocks).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        for entry in result["policies"]:
            policy = policies[entry["policy"]]
            moe.set_policy(policy.layers)
            logp = moe(blocks).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            assert entry["perplexity"] == pytest.approx(F.nll_loss(logp, targets).exp().item(), rel=1e-3)
            assert entry["kl"] == pytest.approx(
                F.kl_div(logp, reference, reduction="batchmean", log_target=True).item(), rel=1e-2
            )
            agreement = (logp.argmax(-1) == reference.argmax(-1)).float().mean().item()
            assert entry["next_token_agreement"] == pytest.approx(agreement, abs=0.01)
            assert entry["version"] == policy.version
            assert entry["active_parameters_ratio"] == config.active_parameters_ratio(tuple(entry["experts_per_token"]))
            # Weights have one precision, so bytes and operations are the same share. The output head counts, too.
            assert entry["decode_bytes_ratio"] == entry["prefill_operations_ratio"]
            assert entry["batch_bytes_ratio"] >= entry["decode_bytes_ratio"] - 1e-9  # tokens choose different experts
            skipped = (1 - entry["active_parameters_ratio"]) * config.dense_parameters
            assert 1 - entry["prefill_operations_ratio"] == pytest.approx(
                skipped / (config.dense_parameters + config.head_parameters)
            )


def test_one_policy_and_an_unknown_one(made: Made) -> None:
    result = evaluate_checkpoint(str(made.out), made.text, policy="fast", tokens=100)
    assert [entry["policy"] for entry in result["policies"]] == ["fast"]
    with pytest.raises(ValueError, match="policy 'none' is unknown; known: .*balanced, fast, full"):
        evaluate_checkpoint(str(made.out), made.text, policy="none")


@pytest.fixture
def moved(made: Made, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the checkpoint whose provenance names a place where the dense source no longer is, and where it is now."""
    shutil.copytree(made.out, tmp_path / "moe")
    shutil.copytree(made.dense, tmp_path / "dense")
    provenance = tmp_path / "moe/provenance.json"
    provenance.write_text(provenance.read_text().replace(str(made.dense), str(tmp_path / "gone")))
    return tmp_path / "moe", tmp_path / "dense"


def test_without_the_dense_source_its_figures_are_null(made: Made, moved: tuple[Path, Path]) -> None:
    moe, dense = moved
    alone = evaluate_checkpoint(str(moe), made.text, tokens=100)
    whole = evaluate_checkpoint(str(moe), made.text, tokens=100, dense=dense)
    assert alone["dense"] == {"perplexity": None}
    for entry, known in zip(alone["policies"], whole["policies"], strict=True):
        assert list(entry) == KEYS
        assert (entry["perplexity_ratio"], entry["next_token_agreement"], entry["kl"]) == (None, None, None)
        assert entry["perplexity"] == pytest.approx(known["perplexity"], rel=1e-5)
        assert entry["experts_per_token"] == known["experts_per_token"]
    (dense / "config.json").write_text((dense / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="is not the dense source"):
        evaluate_checkpoint(str(moe), made.text, tokens=100, dense=dense)


def test_profile_rebuilds_policies_without_touching_weights(made: Made, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    shutil.copytree(made.out, moe)
    config = read_config(moe)
    mine = RoutingPolicy("mine", "the user's own", read_policies(moe, config)["full"].layers)
    write_policy(moe, mine)
    stale = {path.stem for path in (moe / POLICIES).glob("mass-*")}
    text = make_text(tmp_path / "other.txt", seed=5)
    report = reprofile(str(moe), text)
    policies, frontier = read_policies(moe, config), read_frontier(moe)
    made_now = {entry["policy"] for entry in report["policies"]}
    assert set(policies) == made_now | {"mine"}
    assert not (stale - made_now) & set(policies)
    assert frontier is not None
    assert frontier.to_dict() == report["frontier"] != read_json(made.out / "report.json")["frontier"]
    assert (moe / "model.safetensors").read_bytes() == (made.out / "model.safetensors").read_bytes()
    assert "other.txt" in (moe / "report.md").read_text()
    again = evaluate_checkpoint(str(moe), text, tokens=100)
    assert len(again["policies"]) == len(policies)


def test_profile_needs_an_expert_model_and_its_source(made: Made, moved: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="is a dense model"):
        reprofile(str(made.dense), made.text)
    before = {file: file.read_bytes() for file in moved[0].rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="give --dense"):
        reprofile(str(moved[0]), made.text)
    assert {file: file.read_bytes() for file in moved[0].rglob("*") if file.is_file()} == before
