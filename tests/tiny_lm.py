"""Tiny language models that the tests make themselves, and `transformers serve` with one.

`make_tiny_lm` trains a two-layer chat model in seconds to play chosen kinds of the toy benchmark through the project's
own prompts, so that two of them are a real pair: what both know is Easy, what only the large one knows is Hard.
`make_untrained_lm` is for tests that need no sense. The same seed makes the same model on one machine.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bopo_ray.agent import Turn, chat_messages
from bopo_ray.models.protocol import Message
from tests.toy import PLANS, Toy

__all__ = ["KNOWABLE", "make_tiny_lm", "make_untrained_lm", "reply_to", "serve"]

KNOWABLE = ("fetch", "measure", "mix")
"""Kinds that a model can be taught; "long" is beyond all of them."""
USELESS = "look around"
"""What a model does in tasks of a kind that it does not know."""
PATIENCE_S = 180.0
"""Until a server counts as dead; long, because the machine may be busy."""

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, PAD = "<|im_end|>", "<|pad|>"


def reply_to(action: str, thought: str = "unsure") -> str:
    """How these models write an action; a thought that counts the plan's steps makes the next one easy to tell."""
    return f"Thought: {thought}.\nAction: {action}"


def make_tiny_lm(folder: Path, knows: Sequence[str], seed: int = 0, steps: int = 0) -> Path:
    """Trains a model that solves the `knows` kinds of the toy benchmark, and looks around in the others.

    `steps` of training are chosen by what there is to learn; on a core of its own 100 of them take 5 s.
    """
    draw = random.Random(seed)
    talks = [_talk(kind, knows, draw) for kind in (*KNOWABLE, "long") for _ in range(100)]
    tokenizer = _tokenizer([m.content for talk in talks for m, _ in talk])
    model = _model(tokenizer, seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum in another order would make another model
    try:
        _train(model, tokenizer, knows, draw, steps or 220 + 60 * len(knows))
    finally:
        torch.set_num_threads(threads)
    return _save(model, tokenizer, folder)


def make_untrained_lm(folder: Path, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """A model of the same form that writes noise; without a chat template when `template` is None."""
    tokenizer = _tokenizer([reply_to(action, kind) for kind, plan in PLANS.items() for action in plan])
    tokenizer.chat_template = template
    return _save(_model(tokenizer, seed, spread=0.3), tokenizer, folder)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """`transformers serve` with the model in `folder`; yields its base URL. Its name there is the folder's path.

    The process is gone when the context is left.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    log = folder.with_name(f"{folder.name}-serve-{port}.log")
    cache = folder.with_name("empty-hub-cache")
    cache.mkdir(exist_ok=True)  # without one its list of models is a 500
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_CACHE": str(cache),
                                "OMP_NUM_THREADS": "1"}  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_ready(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            ended = process.poll() is not None
            assert not ended and time.monotonic() < until, f"no server:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)


def _talk(kind: str, knows: Sequence[str], draw: random.Random) -> list[tuple[Message, bool]]:
    """One whole episode as the agent's prompt has it, and which of its messages are replies to learn.

    Some steps are another model's, which knows less, or more; these are not learned.
    """
    toy = Toy()
    first, info = toy.reset(options={"task": f"{kind}/{draw.randrange(300)}"})
    turns, learned = list[Turn](), [False, False]
    over, noise = False, draw.choice((0.0, 0.0, 0.3, 0.6))
    while not over and len(turns) < 9:
        step = toy.plan[toy.done], f"{kind} step {toy.done + 1}"
        other = (USELESS,) if draw.random() < 0.8 else ("wait1",)
        right, wrong = (step, other) if kind in knows else ((USELESS,), step)
        done = wrong if draw.random() < noise else right
        observation, _, over, _, _ = toy.step(done[0])
        turns.append(Turn(reply_to(*done), done[0], observation))
        learned += [done == right, False]
    messages = chat_messages(info["task_text"], first, turns, toy.action_guide, 10**6, lambda m: 0)
    return list(zip(messages, learned, strict=True))


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, "<|im_start|>", END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*texts, "system user assistant\n"],
        trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=2048, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _model(tokenizer: PreTrainedTokenizerFast, seed: int, spread: float = 0.02) -> LlamaForCausalLM:
    """`spread` of the first weights: 0.02 to be trained, much more to say something without."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=spread < 0.1, initializer_range=spread,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, knows: Sequence[str], draw: random.Random, steps: int
) -> None:
    """A batch holds whole episodes, so that each one teaches a reply to every history that it passes through."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps, pct_start=0.1)
    model.train()
    unknown = [kind for kind in (*KNOWABLE, "long") if kind not in knows]
    known = [*knows] * (1 if len(knows) > 1 else 2)
    for _ in range(steps):
        kinds = known + [draw.choice(unknown) for _ in range(4 - len(known))]
        rows = [_encode(_talk(kind, knows, draw), tokenizer) for kind in kinds]
        width = max(len(ids) for ids, _ in rows)
        ids_BT = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        learned_BT = torch.tensor([learned + [False] * (width - len(learned)) for _, learned in rows])
        # Padding stands on the right, where no attention of the past sees it.
        hidden_BTD = model.model(input_ids=ids_BT[:, :-1]).last_hidden_state
        target_BT = learned_BT[:, 1:]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden_BTD[target_BT]), ids_BT[:, 1:][target_BT])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _encode(talk: list[tuple[Message, bool]], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Token ids of an episode, and which of them are part of a reply to learn, its end included."""
    ids, learned = list[int](), list[bool]()
    for message, learn in talk:
        head = tokenizer.encode(f"<|im_start|>{message.role}\n", add_special_tokens=False)
        body = tokenizer.encode(f"{message.content}{END}", add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        ids += head + body + tail
        learned += [False] * len(head) + [learn] * len(body) + [False] * len(tail)
    return ids, learned
