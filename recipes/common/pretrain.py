"""Trains a chat model from scratch for a given number of minutes.

Guarantees a folder that `AutoModelForCausalLM.from_pretrained` loads, weights rounded to bfloat16, and `training.json`
with the measurements of the run.  Does not know drafters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from recipes.common.corpus import Corpus, streams
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from redrafter.training.recipe import rate_factor

WARM_UP, WEIGHT_DECAY = 0.02, 0.1
DROPOUT = 0.1  # what every layer adds; the chat files are seen several times and would be learnt by heart


def drop_out(model: PreTrainedModel) -> None:
    """Adds dropout to the outputs of attention and MLP, which these models lack."""

    def hook(module: torch.nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


class Stream:
    """One token stream on the device, read in windows of one context plus one token."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, context: int, device: torch.device):
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.starts = torch.from_numpy(starts).to(device)
        self.window = torch.arange(context + 1, device=device)

    def from_row_starts(self, count: int) -> torch.Tensor:
        """`count` windows that begin with a row, as at the start of a conversation."""
        anywhere = torch.randint(len(self.ids) - len(self.window), (count,), device=self.ids.device)
        picks = torch.searchsorted(self.starts, anywhere, right=True) - 1  # rows are met in proportion to their length
        return self.ids[self.starts[picks][:, None] + self.window].long()

    def from_anywhere(self, count: int) -> torch.Tensor:
        """`count` windows at random offsets."""
        picks = torch.randint(len(self.ids) - len(self.window), (count, 1), device=self.ids.device)
        return self.ids[picks + self.window].long()


def fit(
    model: PreTrainedModel,
    loss: Callable[[], torch.Tensor],
    *,
    seconds: float,
    peak_rate: float,
    weight_decay: float = WEIGHT_DECAY,
    tell: Callable[[int, torch.Tensor, float], None] = lambda *_: None,
) -> int:
    """Minimises `loss` with AdamW for some seconds after a first step that may compile; returns the number of steps.

    `tell` receives each step's number, its loss and the fraction of the time that has passed.
    """
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=model.device.type == "cuda",
    )
    loss().backward()
    optimizer.zero_grad()
    begin, step = time.perf_counter(), 0
    while (progress := (time.perf_counter() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * rate_factor(progress, WARM_UP)
        found = loss()
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(step, found, progress)
        step += 1
    return step


def train(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainedConfig,
    output: Path,
    *,
    peak_rate: float,
    chat_share: float,
    minutes: float,
    batch: int,
    device: torch.device,
    dtype: str,
    seed: int = 0,
) -> None:
    """Trains for `minutes` of wall time (after compiling) on windows of one context and writes `output`.

    `chat_share` of each batch are windows that begin with a conversation, the others start anywhere in the plain text;
    `dtype` is the dtype in the saved config.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    clock = time.perf_counter()

    def stream(files: dict[str, float], *, held_out: bool = False) -> Stream:
        return Stream(*streams(corpus.folder, tokenizer, files, held_out=held_out), corpus.context, device)

    chat, text = stream(corpus.chat), stream(corpus.text) if corpus.text else None
    held_out = {name: stream({name: 1}, held_out=True) for name in corpus.files}
    print(
        f"data: {len(chat.ids):,} chat and {len(text.ids) if text else 0:,} text tokens "
        f"in {time.perf_counter() - clock:.0f} s",
        flush=True,
    )

    def windows(count: int) -> torch.Tensor:
        if text is None:
            return chat.from_row_starts(count)
        chats = round(count * chat_share)
        return torch.cat([chat.from_row_starts(chats), text.from_anywhere(count - chats)])

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).train()
    drop_out(model)

    def loss_of(window: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            losses = {
                n: round(sum(loss_of(s.from_anywhere(8)).item() for _ in range(8)) / 8, 4) for n, s in held_out.items()
            }
        model.train()
        return losses

    curve = []

    def tell(step: int, loss: torch.Tensor, progress: float) -> None:
        if step % 1000 == 0:
            curve.append((step, round(loss.item(), 4)))
            print(f"step {step} loss {curve[-1][1]:.3f} {progress:.0%} held out {evaluate()}", flush=True)

    step = fit(model, lambda: step_loss(windows(batch)), seconds=60 * minutes, peak_rate=peak_rate, tell=tell)
    in_bfloat16(model)
    record = {
        "parameters": model.num_parameters(),
        "steps": step,
        "tokens": step * batch * corpus.context,
        "minutes": minutes,
        "files": corpus.chat | corpus.text,
        "data_tokens": len(chat.ids) + (len(text.ids) if text else 0),
        "batch": batch,
        "held_out_loss": evaluate(),
        "loss": curve,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    save(model, tokenizer, output, record, dtype)
    print(json.dumps({k: v for k, v in record.items() if k != "loss"}), flush=True)


def in_bfloat16(model: torch.nn.Module) -> None:
    """Rounds the weights, so that the saved weights are the ones that are measured."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)


def save(model: PreTrainedModel, tokenizer, output: Path, record: dict, dtype: str) -> None:
    """Writes the model in bfloat16 with a config for `dtype`."""
    output.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(output)
    GenerationConfig(eos_token_id=1, pad_token_id=0).save_pretrained(output)
    tokenizer.save_pretrained(output)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {k: v.bfloat16().cpu().contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
