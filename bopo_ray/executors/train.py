"""Behaviour cloning of a small Llama from scratch: tokenizer, updates, and a folder that `transformers` loads.

Always true here: the same recipe, demonstrations and number of threads give the same weights on a CPU, and weights that
differ in the last bits on a GPU; an interrupted training goes on from its last checkpoint, of the same recipe,
demonstrations and tokenizer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tensorboardX import SummaryWriter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bopo_ray.errors import ConfigError
from bopo_ray.executors.augment import augmented
from bopo_ray.executors.copying import copying_batch, write_previous_token_head
from bopo_ray.executors.demos import Demo
from bopo_ray.executors.recipes import Recipe
from bopo_ray.executors.sequences import Stretch, batches, sequences
from bopo_ray.files import write_bytes
from bopo_ray.models.embedded_prompt import CHAT_TEMPLATE, END, PAD, SPECIAL, EmbeddedPrompt

__all__ = ["HELD_OUT", "train", "train_tokenizer"]

MILLION = 1_000_000
VOCABULARY = 3072
_WORD = r" ?[a-z]+| ?[0-9]| ?[^\sa-z0-9]+|\s+"
"""What the tokenizer never joins across: a word, a digit, a run of signs, each with the space before it."""
CHUNK = 256
"""Demonstrations that are augmented, encoded and sorted by length at a time."""
CHECKPOINT_S = 60.0
TEXT_SHARE = 0.3
"""Share of the text's tokens that an update predicts, each with its weight divided by this: the last layer is dear."""
HELD_OUT = 20
"""Every so many-th demonstrated task is held out of training, to watch the loss on."""


def train_tokenizer(demos: Sequence[Demo], path: Path) -> None:
    """A byte-level BPE in which nearly every word of the environment is one token; digits stand alone."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
            normalizers.Prepend(" "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORD), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (t for d in demos for t in (d.task_text, d.first_observation, *d.actions, *d.observations))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False, min_frequency=3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def train(
    env_id: str, demos: Sequence[Demo], recipe: Recipe, work: Path, out: Path, report: Callable[[str], None],
    device: str = "cpu",
) -> dict[str, float]:  # fmt: skip
    """Trains one model.

    Args:
        env_id: whose demonstrations these are.
        demos: clean and noisy ones.
        recipe: how.
        work: folder of checkpoints and TensorBoard's files.
        out: where the finished model is written; it holds tokenizer.json already.
        report: takes a line of progress.
        device: "cpu" or "cuda".

    Raises ConfigError when `work` holds a checkpoint of another recipe or other demonstrations, and when there are none
    to learn from.

    Returns the losses at the end: of held-out tasks' actions, in nats per token, and the share of actions written
    without an error when everything before them is given.
    """
    torch.manual_seed(recipe.seed)
    prompt = EmbeddedPrompt(out, recipe.context)
    names = sorted({d.task for d in demos})
    held = set(names[HELD_OUT // 2 :: HELD_OUT])
    learn = [d for d in demos if d.task not in held and (recipe.noisy or not d.noisy)]
    if not learn:
        raise ConfigError(f"none of {len(demos)} demonstrations can be learned from: show more tasks, see --demos")
    check = [s for d in demos if d.task in held and not d.noisy for s in sequences(d, prompt)]
    # Attention by plain matrices: on a CPU, with long sequences and few wide heads, half the time of the fused kernel.
    attention = "eager" if device == "cpu" else "sdpa"
    model = LlamaForCausalLM._from_config(_config(prompt, recipe), attn_implementation=attention)
    if recipe.copying:
        write_previous_token_head(model, recipe.seed)
    model.to(device)
    optimizer = torch.optim.AdamW(_groups(model), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.1)
    work.mkdir(parents=True, exist_ok=True)
    made_of = {"recipe": asdict(recipe), "texts": _texts(demos, out / "tokenizer.json")}
    seen, step = _resume(work, model, optimizer, made_of)
    if seen:
        report(f"goes on after {seen / 1e6:.1f} million tokens")
    board = SummaryWriter(str(work))
    goal, started, saved = recipe.tokens * MILLION, time.monotonic(), time.monotonic()
    began, said, mean = seen, 0, torch.zeros(2, device=device)
    for batch in _ahead(_Stream(env_id, learn, prompt, recipe, skip=step), device):
        if seen >= goal:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(seen / goal, step)
        loss, action = _update(model, optimizer, batch, recipe, step)
        tokens = sum(len(s.ids) for s in batch)
        seen, step = seen + tokens, step + 1
        mean = 0.98 * mean + 0.02 * torch.stack([action, torch.ones_like(action)])
        if step % 20 == 0:
            board.add_scalar("loss/all", float(loss), seen)
            board.add_scalar("loss/action", float(action), seen)
        if seen - said > goal / 40 or seen >= goal:
            said = seen
            held_loss, exact = _check(model, check, recipe)
            board.add_scalar("held_out/action_loss", held_loss, seen)
            board.add_scalar("held_out/actions_exact", exact, seen)
            spent = time.monotonic() - started
            left = spent / (seen - began) * (goal - seen)
            report(
                f"{seen / 1e6:.3f} of {goal / 1e6:g} M tokens, action loss {float(mean[0] / mean[1]):.3f}, held out "
                f"{held_loss:.3f}, exact {exact:.3f}; {(seen - began) / spent:.0f} tokens/s, {left:.0f} s left"
            )
        if time.monotonic() - saved > CHECKPOINT_S or seen >= goal:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seen": seen, "step": step}
            # Into a file, torch says of a full disk what nobody understands.
            torch.save(state | made_of, whole := io.BytesIO())
            write_bytes(work / "checkpoint.pt", whole.getvalue())
    board.close()
    held_loss, exact = _check(model, check, recipe)
    _save(model, out, recipe)
    return {"held_out_action_loss": held_loss, "held_out_actions_exact": exact}


def _config(prompt: EmbeddedPrompt, recipe: Recipe) -> LlamaConfig:
    ids = {t: prompt.tokenizer.token_to_id(t) for t in SPECIAL}
    return LlamaConfig(
        vocab_size=prompt.tokenizer.get_vocab_size(), hidden_size=recipe.width, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, intermediate_size=8 * recipe.width // 3,
        max_position_embeddings=recipe.context, tie_word_embeddings=True, rms_norm_eps=1e-5, use_cache=True,
        initializer_range=0.02, bos_token_id=ids["<task>"], eos_token_id=ids[END], pad_token_id=ids[PAD],
    )  # fmt: skip


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Decay of matrices only."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if p.ndim >= 2 and "embed" not in n]},
        {"params": [p for n, p in named if p.ndim < 2 or "embed" in n], "weight_decay": 0.0},
    ]


def _schedule(progress: float, step: int) -> float:
    """Warm-up over 100 updates, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass(frozen=True)
class _Stream(IterableDataset[list[Stretch]]):
    """Batches without end; the first `skip` are left out."""

    env_id: str
    demos: Sequence[Demo]
    prompt: EmbeddedPrompt
    recipe: Recipe
    skip: int

    def __iter__(self) -> Iterator[list[Stretch]]:
        return _stream(self.env_id, self.demos, self.prompt, self.recipe, self.skip)


def _ahead(stream: _Stream, device: str) -> Iterator[list[Stretch]]:
    """The same batches; for a GPU, which must not wait for them, made in a process of their own."""
    if device == "cpu":
        return iter(stream)
    return iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=64, multiprocessing_context="fork"))


def _stream(
    env_id: str, demos: Sequence[Demo], prompt: EmbeddedPrompt, recipe: Recipe, skip: int
) -> Iterator[list[Stretch]]:
    count, epoch, vocabulary, copied = 0, 0, prompt.tokenizer.get_vocab_size(), 0
    rng = random.Random(f"{recipe.seed} copying")
    while copied < recipe.copying * MILLION:
        batch = copying_batch(vocabulary, recipe.batch_tokens, copied / (recipe.copying * MILLION), rng)
        copied, count = copied + sum(len(s.ids) for s in batch), count + 1
        if count > skip:
            yield batch
    while True:
        rng = random.Random(f"{recipe.seed} {epoch}")
        order = rng.sample(range(len(demos)), len(demos))
        for at in range(0, len(order), CHUNK):
            part = (demos[i] for i in order[at : at + CHUNK])
            read = [augmented(env_id, d, rng) if rng.random() < recipe.augment else d for d in part]
            for batch in batches([s for d in read for s in sequences(d, prompt)], recipe.batch_tokens, rng):
                count += 1
                if count > skip:
                    yield batch
        epoch += 1


def _padded(batch: Sequence[Stretch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and kinds, [B, T] each, padded on the right (which a causal model does not see)."""
    width = max(len(s.ids) for s in batch)
    ids = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in batch])
    kinds = torch.tensor([s.kinds + [0] * (width - len(s.kinds)) for s in batch])
    return ids, kinds


def _losses(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each chosen token, and whether it was the likeliest. `rows` [N] indexes ids[:, 1:].flatten()."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[rows])
    targets = ids[:, 1:].flatten()[rows]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"), logits.argmax(-1) == targets


def _update(
    model: Any, optimizer: Any, batch: Sequence[Stretch], recipe: Recipe, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update. Returns its loss, and that of the actions alone; nothing here waits for a GPU."""
    ids, kinds = _padded(batch)
    flat = kinds[:, 1:].flatten()
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    text = (flat == 1) & (torch.rand(len(flat), generator=generator) < TEXT_SHARE) & (recipe.text_weight > 0)
    rows = torch.nonzero((flat == 2) | text).flatten()
    action = flat[rows] == 2
    weights = torch.where(action, 1.0, recipe.text_weight / TEXT_SHARE)
    weights, shares = weights / weights.sum().clamp_min(1.0), action / action.sum().clamp_min(1)
    device = model.device
    losses, _ = _losses(model, ids.to(device), rows.to(device))
    loss = (losses * weights.to(device)).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach(), (losses.detach() * shares.to(device)).sum()


@torch.no_grad()
def _check(model: Any, stretches: Sequence[Stretch], recipe: Recipe) -> tuple[float, float]:
    """Mean loss of the actions' tokens, and the share of actions of which every token is the likeliest one."""
    total, tokens, exact, actions = 0.0, 0, 0, 0
    for batch in batches(stretches, 4 * recipe.batch_tokens, random.Random(0)):
        ids, kinds = _padded(batch)
        flat = kinds[:, 1:].flatten()
        rows = torch.nonzero(flat == 2).flatten()
        if not len(rows):
            continue
        losses, right = (x.cpu() for x in _losses(model, ids.to(model.device), rows.to(model.device)))
        total, tokens = total + float(losses.sum()), tokens + len(rows)
        starts = torch.cat([torch.ones(1, dtype=torch.bool), rows[1:] != rows[:-1] + 1]).cumsum(0) - 1
        wrong = torch.zeros(int(starts[-1]) + 1).index_add_(0, starts, (~right).float())
        exact, actions = exact + int((wrong == 0).sum()), actions + len(wrong)
    return total / max(1, tokens), exact / max(1, actions)


def _texts(demos: Sequence[Demo], tokenizer: Path) -> str:
    """A hash of what is read, and of how it becomes tokens."""
    digest = hashlib.blake2b(tokenizer.read_bytes(), digest_size=16)
    for demo in demos:
        digest.update(repr(demo).encode())
    return digest.hexdigest()


def _resume(work: Path, model: torch.nn.Module, optimizer: Any, made_of: dict[str, Any]) -> tuple[int, int]:
    """Tokens and updates done so far. Raises ConfigError for a checkpoint that was made of something else."""
    path = work / "checkpoint.pt"
    with contextlib.suppress(FileNotFoundError):
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path} is damaged: remove it, and the training begins anew") from error
        if any(state.get(name) != value for name, value in made_of.items()):
            raise ConfigError(
                f"{path} was made with another recipe or other demonstrations: give the options that it was begun "
                "with, remove it, or choose another --name or --work"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["seen"]), int(state["step"])
    return 0, 0


def _save(model: Any, out: Path, recipe: Recipe) -> None:
    """The weights in half precision, the tokenizer with its chat template, and how to generate."""
    ids = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    try:
        model.to("cpu", torch.float16).save_pretrained(out)
    except SafetensorError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(out / "tokenizer.json"), eos_token=END, pad_token=PAD, bos_token="<task>",
        chat_template=CHAT_TEMPLATE, model_max_length=recipe.context, clean_up_tokenization_spaces=False,
        additional_special_tokens=[t for t in SPECIAL if t not in (END, PAD, "<task>")],
    )  # fmt: skip
    fast.save_pretrained(out)
