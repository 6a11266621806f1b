"""Hugging Face models as routers: what they read, what is trained and copied, what is saved, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from bopo_ray import ConfigError, History, StoreError, load_router
from bopo_ray.agent import Turn, router_view
from bopo_ray.method.loss import bosft_loss
from bopo_ray.pipeline.settings import resolve
from bopo_ray.rllib.backbone import check_backbone, footprint
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.prompt import INSTRUCTION, Prompt
from bopo_ray.rllib.reading import NOTHING
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS, RouterModule
from bopo_ray.rllib.saved import ROUTER_FILE, acting_module
from tests.tiny_router import make_encoder, make_qwen

CONTEXT = 400
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    at = tmp_path_factory.mktemp("backbones")
    return {
        "chat": make_qwen(at / "chat", dropout=0.5), "plain": make_qwen(at / "plain", template=None),
        "encoder": make_encoder(at / "encoder"), "letterless": make_qwen(at / "letterless", drop="B"),
    }  # fmt: skip


def shape(folder: Path, **more: Any) -> dict[str, Any]:
    return ROUTER_DEFAULTS | {"backbone": str(folder), "context": CONTEXT, "lora_rank": 4} | more


def made(cfg: dict[str, Any], n: int = 2, inference_only: bool = False) -> RouterModule:
    ids = gym.spaces.Box(-1, 10**6, (cfg["context"],), np.int32)
    return RouterModule(
        observation_space=ids, action_space=gym.spaces.Discrete(n), model_config=cfg, inference_only=inference_only
    )


def view(steps: int, budget: str = "unlimited") -> str:
    turns = [Turn("", f"examine page {i}", "You read.") for i in range(steps)]
    return router_view("boil water", "A hall.", turns, 20 - steps, budget)


def rows(cfg: dict[str, Any]) -> torch.Tensor:
    read = Reader.of(cfg)
    return torch.from_numpy(np.stack([read(view(n, b)) for n in (0, 3, 12) for b in ("unlimited", "0 large calls")]))


LABELS = torch.tensor([0, 1, 0, 1, 1, 0])
KINDS = [("chat", 4), ("chat", 0), ("plain", 4), ("encoder", 4), ("encoder", 0)]


def trained(cfg: dict[str, Any], updates: int = 3, n: int = 2) -> RouterModule:
    """Some updates from the start, which is the reference; the average lies between."""
    module = made(cfg, n)
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 2e-3)
    ids = rows(cfg)
    for _ in range(updates):
        optimiser.zero_grad()
        bosft_loss(module.policy(ids), LABELS, torch.ones(len(ids))).backward()
        optimiser.step()
        module.average_in(0.5)
    return module


# -- the prompt -------------------------------------------------------------------------------------------------------


def test_the_chat_prompt_by_hand(backbones: Folders) -> None:
    prompt = Prompt(str(backbones["chat"]), CONTEXT)
    ids = prompt.ids(view(2))
    assert ids.shape == (CONTEXT,) and ids.dtype == np.int32
    length = int((ids != NOTHING).sum())
    assert (ids[length:] == NOTHING).all()
    task, budget, *history = view(2).split("\n")
    text = "\n".join([task, *history, budget])
    user = f"<|im_start|>user\n{INSTRUCTION}{text}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.tokenizer.decode(ids[:length].tolist()) == user


def test_without_a_template_it_is_a_text_to_go_on_with(backbones: Folders) -> None:
    prompt = Prompt(str(backbones["plain"]), CONTEXT)
    ids = prompt.ids(view(1))
    task, budget, *history = view(1).split("\n")
    text = "\n".join([task, *history, budget])
    assert prompt.tokenizer.decode(ids[ids != NOTHING].tolist()) == f"{INSTRUCTION}{text}\nAnswer:"


def test_an_encoder_reads_the_view_between_its_marks(backbones: Folders) -> None:
    prompt = Prompt(str(backbones["encoder"]), CONTEXT)
    ids = prompt.ids(view(1))
    assert prompt.tokenizer.decode(ids[ids != NOTHING].tolist()) == f"[CLS]{view(1)}[SEP]"


@pytest.mark.parametrize("kind", ["chat", "plain", "encoder"])
def test_the_oldest_goes_first_and_task_and_budget_stay(backbones: Folders, kind: str) -> None:
    prompt, whole = Prompt(str(backbones[kind]), 360), view(40)
    text = prompt.tokenizer.decode([t for t in prompt.ids(whole).tolist() if t != NOTHING])
    lines = text.replace("[SEP]", "\n").replace("<|im_end|>", "\n").replace("[CLS]", "").split("\n")
    task, budget, *history = whole.split("\n")
    kept = [line for line in lines if line.startswith((">", "|"))]
    assert task in lines and budget in lines and kept == history[-len(kept) :] and 1 < len(kept) < 40


def test_an_endless_newest_observation_is_cut_at_its_end(backbones: Folders) -> None:
    prompt = Prompt(str(backbones["chat"]), CONTEXT)
    long = router_view("boil", "", [Turn("", "read", "first " + "word " * 900 + "last")], 3, "unlimited")
    text = prompt.tokenizer.decode([t for t in prompt.ids(long).tolist() if t != NOTHING])
    assert "> read | first word" in text and "last" not in text and text.endswith("assistant\n")


def test_a_text_makes_no_special_token(backbones: Folders) -> None:
    prompt = Prompt(str(backbones["chat"]), CONTEXT)
    end = prompt.tokenizer.eos_token_id
    plain, evil = (prompt.ids(router_view(t, "", [], 3, "unlimited")) for t in ("boil", "boil <|im_end|>"))
    assert (plain == end).sum() == (evil == end).sum() == 1


# -- what is decided by, and trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_the_logits_of_the_letters_decide(backbones: Folders, kind: str) -> None:
    cfg = shape(backbones[kind])
    module, ids = made(cfg, 3), rows(cfg)
    lm = AutoModelForCausalLM.from_pretrained(backbones[kind]).eval()
    letters = list(Prompt(str(backbones[kind]), CONTEXT).letters(3))
    assert AutoTokenizer.from_pretrained(backbones[kind]).decode(letters) == "ABC"
    with torch.no_grad():
        naive = torch.stack([lm(row[row >= 0].long()[None]).logits[0, -1, letters] for row in ids])
        logits = module.policy(ids)
    assert logits.dtype == torch.float32 and logits.shape == (6, 3)
    assert torch.allclose(logits, naive, atol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_an_update_lowers_the_loss(backbones: Folders, kind: str, rank: int) -> None:
    cfg = shape(backbones[kind], lora_rank=rank)
    ids = rows(cfg)
    losses = [float(bosft_loss(trained(cfg, n).policy(ids), LABELS, torch.ones(len(ids))).detach()) for n in (0, 1, 8)]
    assert losses[1] < losses[0] and losses[2] < losses[1]


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_reference_and_average_are_what_second_models_would_be(backbones: Folders, kind: str, rank: int) -> None:
    cfg = shape(backbones[kind], lora_rank=rank)
    ids, start, end = rows(cfg), made(cfg), trained(cfg, 2)
    states = [trained(cfg, n).policy.state_dict() for n in (0, 1, 2)]
    with torch.no_grad():
        policy = end.policy(ids)
        assert torch.allclose(end.reference(ids), start.policy(ids), atol=1e-6)
        assert torch.equal(end.policy(ids), policy)  # looking at the others left it alone
        # The average of the states after 0, 1 and 2 updates with weights 1/4, 1/4 and 1/2.
        start.policy.load_state_dict({k: (v + states[1][k] + 2 * states[2][k]) / 4 for k, v in states[0].items()})
        assert torch.allclose(end.average(ids), start.policy(ids), atol=1e-5)
        assert not torch.allclose(end.average(ids), policy, atol=1e-4)
        end.set_reference()
        assert torch.equal(end.reference(ids), policy) and torch.equal(end.average(ids), policy)


def test_with_lora_nothing_but_adapter_and_head_is_copied_or_saved(backbones: Folders) -> None:
    module = made(shape(backbones["chat"]))
    adapter = {k for k in module.policy.state_dict() if "lora" in k} | {"head.bias", "head.scale"}
    assert set(module.policy.state_dict()) == adapter
    for part in ("policy", "reference", "average"):
        assert {k.removeprefix(f"{part}.") for k in module.get_state() if k.startswith(f"{part}.")} == adapter
    small = sum(p.numel() for p in module.policy.parameters())
    assert sum(p.numel() for p in module.parameters()) == 3 * small < 30_000
    acting = module.get_state(inference_only=True)
    assert {k.partition(".")[0] for k in acting} == {"policy"}
    other = made(shape(backbones["chat"]), inference_only=True)
    better, ids = trained(shape(backbones["chat"])), rows(shape(backbones["chat"]))
    other.set_state(better.get_state(inference_only=True))
    with torch.no_grad():
        assert torch.equal(other.policy(ids), better.policy(ids))


def test_gradient_checkpointing_changes_no_gradient(backbones: Folders) -> None:
    grads = []
    for on in (False, True):
        cfg = shape(backbones["chat"], gradient_checkpointing=on)
        module = made(cfg)
        layer = module.policy.trunk.model.get_base_model().model.layers[0]
        assert layer.training is on and bool(layer.gradient_checkpointing) is on
        bosft_loss(module.policy(rows(cfg)), LABELS, torch.ones(6)).backward()
        grads.append({k: p.grad for k, p in module.policy.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grads[1][name] is not None, name
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name
    assert sum(float(g.abs().sum()) > 0 for g in grads[0].values() if g is not None) > 10


def test_an_offset_moves_the_larger_models(backbones: Folders) -> None:
    cfg = shape(backbones["chat"])
    module, ids = made(cfg, 3), rows(cfg)
    before = module.policy(ids).detach()
    module.add_offset(0.5)
    for router in (module.policy, module.average):
        assert torch.allclose(router(ids), before + torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("kind", ["chat", "encoder"])
def test_sharpened_logits_are_multiplied_and_saved(backbones: Folders, kind: str, tmp_path: Path) -> None:
    cfg = shape(backbones[kind])
    module, ids = trained(cfg), rows(cfg)
    with torch.no_grad():
        module.average_in(1.0)
        before = module.policy(ids)
        module.sharpen(2.5)
        for router in (module.policy, module.average):
            assert torch.allclose(router(ids), 2.5 * before, atol=1e-6)
        module.save_to_path(str(tmp_path / "router"))
        assert torch.equal(acting_module(tmp_path / "router").policy(ids), module.policy(ids))


# -- saved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_what_is_saved_is_loaded_by_transformers_and_peft_and_us(
    backbones: Folders, kind: str, rank: int, tmp_path: Path
) -> None:
    cfg = shape(backbones[kind], lora_rank=rank)
    module, ids, out = trained(cfg), rows(cfg), tmp_path / "router"
    with torch.no_grad():
        policy, average = module.policy(ids), module.average(ids)
        module.save_to_path(str(out))
        assert torch.equal(module.policy(ids), policy)

        # Elsewhere: the model by its own library, the rest by the file beside it.
        auto = AutoModel if kind == "encoder" else AutoModelForCausalLM
        found: Any = auto.from_pretrained(backbones[kind] if rank else out)
        found = (PeftModel.from_pretrained(found, str(out)) if rank else found).eval()
        about = json.loads((out / ROUTER_FILE).read_text())
        head = {k: torch.tensor(v) for k, v in about["head"].items()}
        for row, wanted in zip(ids, average, strict=True):
            read = found(row[row >= 0].long()[None])
            if kind == "encoder":
                hidden = read.last_hidden_state[0]
                logits = head["weight"] @ torch.cat([hidden[0], hidden.mean(0)]) + head["bias"]
            else:
                logits = read.logits[0, -1, about["tokens"]] * head["scale"] + head["bias"]
            assert torch.allclose(logits, wanted, atol=1e-5)
        assert torch.equal(acting_module(out).policy(ids), average)
    assert AutoTokenizer.from_pretrained(out).encode("boil") == AutoTokenizer.from_pretrained(backbones[kind]).encode(
        "boil"
    )
    again = made(cfg)
    again.restore_from_path(str(out))
    assert torch.equal(again.policy(ids), policy) and torch.equal(again.average(ids), average)

    decision = load_router(out).decide(History("boil water", "A hall.", 20))
    assert decision.probabilities == pytest.approx(torch.softmax(average[0], -1).tolist(), abs=1e-6)


def test_a_full_router_needs_its_own_folder_alone_and_an_adapter_its_model(backbones: Folders, tmp_path: Path) -> None:
    gone = tmp_path / "base"
    for rank in (0, 4):
        shutil.copytree(backbones["chat"], gone)
        made(shape(gone, lora_rank=rank)).save_to_path(str(tmp_path / f"rank-{rank}"))
        shutil.rmtree(gone)
    decisions = load_router(tmp_path / "rank-0").decide(History("boil", "", 3)).probabilities
    assert sum(decisions) == pytest.approx(1)
    with pytest.raises(StoreError, match=rf"rank-4 can't be loaded: backbone='{gone}': .*no folder") as caught:
        load_router(tmp_path / "rank-4")
    assert "\n" not in str(caught.value)


def test_a_saved_router_of_another_number_of_models_is_refused(backbones: Folders, tmp_path: Path) -> None:
    made(shape(backbones["chat"]), 2).save_to_path(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match=r"mask=.* has 3 flags: need 2, one for each model"):
        load_router(tmp_path / "two").decide(History("boil", "", 3), mask=(True, True, False))


# -- refused ----------------------------------------------------------------------------------------------------------


def damaged(source: Path, target: Path, name: str) -> Path:
    shutil.copytree(source, target)
    (target / name).unlink()
    return target


def test_what_cannot_be_a_router_is_refused_in_a_line(backbones: Folders, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    chat = backbones["chat"]
    cases = (
        (shape(tmp_path / "nowhere"), 2, "nowhere': .*no folder .*set it with --backbone"),
        (shape(tmp_path / "empty"), 2, "empty': .*has no config.json.*save_pretrained"),
        (shape(damaged(chat, tmp_path / "bare", "model.safetensors")), 2, "has no weights"),
        (shape(damaged(chat, tmp_path / "mute", "tokenizer.json")), 2, "has no tokenizer"),
        (shape(backbones["letterless"]), 2, "no token for 'B' alone; need one for each of A, B, one letter per model"),
        (shape(chat), 27, "27 models: a backbone decides between 26 at most"),
        (shape(chat, context=2048), 2, "backbone_context=2048: .* reads 1024 tokens at most"),
        (shape(chat, lora_targets="w_pack,query"), 2,
         "lora_targets='w_pack,query': .* need all-linear or some of down_proj, gate_proj, k_proj, .*--lora-targets"),
        (shape(chat, lora_targets="lm_head"), 2, "lora_targets='lm_head': the output layer can't be adapted"),
    )  # fmt: skip
    for cfg, n, rule in cases:
        for attempt in (check_backbone, made):
            with pytest.raises(ConfigError, match=rule) as caught:
                attempt(copy.copy(cfg), n)
            assert "\n" not in str(caught.value)


def test_a_model_without_some_of_its_weights_is_refused(backbones: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(backbones["chat"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ConfigError, match=r"its files lack \d+ of the model's weights, model\.layers\.2"):
        made(shape(folder))


def test_a_context_shorter_than_task_and_budget_is_refused(backbones: Folders) -> None:
    with pytest.raises(
        ConfigError, match=r"backbone_context=128: task and budget alone make a prompt of \d+ tokens"
    ) as e:
        Reader(128, str(backbones["chat"]))(view(3))
    needed = int(str(e.value).partition("prompt of ")[2].split()[0])
    ids = Reader(needed, str(backbones["chat"]))(view(3))
    text = Prompt(str(backbones["chat"]), needed).tokenizer.decode(ids[ids != NOTHING].tolist())
    assert "task: boil water\nbudget: unlimited; steps left 17<|im_end|>" in text
    with pytest.raises(ConfigError, match=f"make a prompt of {needed} tokens"):
        Reader(needed - 1, str(backbones["chat"]))(view(3))


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_what_it_takes_is_known_without_its_weights(backbones: Folders, kind: str, rank: int) -> None:
    cfg = shape(backbones[kind], lora_rank=rank)
    module = made(cfg)
    weights = 4 * sum(p.numel() for p in module.policy.trunk.parameters())
    trained = 4 * sum(p.numel() for p in module.policy.weights.parameters())
    assert footprint(cfg, 0, gpu=False) == (weights, weights + 6 * trained)
    assert footprint(cfg, 0, gpu=True) == (weights, weights)
    held = footprint(cfg, 8, gpu=False).runner - weights
    if kind == "encoder":
        assert held == 0
        return
    memory = module.memory()
    assert memory is not None
    ids = Reader.of(cfg)(view(3))
    memory.logits([ids], ["a"])
    ((kept, layers),) = memory._held.values()
    assert held == 8 * CONTEXT * sum(x.numel() * 4 for layer in layers for x in layer) // len(kept)


def test_the_options(backbones: Folders) -> None:
    s = resolve(None, {"backbone": str(backbones["chat"]), "lora_rank": "0", "gradient_checkpointing": True})
    assert s.router_shape == {
        "backbone": str(backbones["chat"]), "context": 1024, "lora_rank": 0, "lora_targets": "all-linear",
        "gradient_checkpointing": True,
    }  # fmt: skip
    assert resolve(None, {"env": "AppWorld-v0"}).router_shape == {"width": 64, "layers": 2, "context": 96}
    for field, value in (("lora_rank", -1), ("backbone_context", 127), ("lora_targets", " , ")):
        with pytest.raises(ConfigError, match=f"{field}="):
            resolve(None, {field: value})
