"""Trains the demo's chat model from scratch: a 12 M parameter Llama, 16 thin layers.

Promises: a folder that `AutoModelForCausalLM.from_pretrained` loads, weights rounded to bfloat16 (the config asks for
float32 arithmetic, which every CPU has), and `training.json` with what was measured on the way.  Does not know
drafters.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from corpus import CHAT_FILES, CONTEXT, TEXT_FILES, VOCABULARY, streams, train_tokenizer
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

PEAK_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 0.02, 0.1
CHAT_SHARE = 0.35  # of each batch
DROPOUT = 0.1  # what every layer adds; the chat files are seen some twenty times and would be learnt by heart


def configuration() -> LlamaConfig:
    """Thin and deep: on a CPU a step then costs launches rather than arithmetic, and small models learn better so."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def drop_out(model: LlamaForCausalLM) -> None:
    """Dropout on what attention and MLP add to the residual stream, which Llama itself has not."""

    def hook(module: torch.nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


class Stream:
    """One token stream on the device, read in windows of CONTEXT + 1 tokens."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, device: torch.device):
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.starts = torch.from_numpy(starts).to(device)
        self.window = torch.arange(CONTEXT + 1, device=device)

    def from_row_starts(self, count: int) -> torch.Tensor:
        """`count` windows, each of which begins with a row: what the model meets when a conversation opens."""
        anywhere = torch.randint(len(self.ids) - CONTEXT - 1, (count,), device=self.ids.device)
        picks = torch.searchsorted(self.starts, anywhere, right=True) - 1  # rows are met in proportion to their length
        return self.ids[self.starts[picks][:, None] + self.window].long()

    def from_anywhere(self, count: int) -> torch.Tensor:
        """`count` windows at random offsets."""
        picks = torch.randint(len(self.ids) - CONTEXT - 1, (count, 1), device=self.ids.device)
        return self.ids[picks + self.window].long()


def rate(progress: float) -> float:
    """Linear warm-up, then cosine to zero."""
    if progress < WARM_UP:
        return PEAK_RATE * progress / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def train(data: Path, output: Path, *, minutes: float, batch: int, device: torch.device, seed: int = 0) -> None:
    """Trains for `minutes` of wall time (after compiling) on windows of CONTEXT tokens and writes `output`."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    clock = time.perf_counter()
    tokenizer = train_tokenizer(data)
    chat = Stream(*streams(data, tokenizer, CHAT_FILES, held_out=False), device)
    text = Stream(*streams(data, tokenizer, TEXT_FILES, held_out=False), device)
    held_out = {n: Stream(*streams(data, tokenizer, (n,), held_out=True), device) for n in CHAT_FILES + TEXT_FILES}
    print(
        f"data: {len(chat.ids):,} chat and {len(text.ids):,} text tokens in {time.perf_counter() - clock:.0f} s",
        flush=True,
    )

    model = LlamaForCausalLM(configuration()).to(device).train()
    drop_out(model)
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )

    def loss_of(window: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    step_loss(chat.from_row_starts(batch)).backward()  # compile outside the time budget
    optimizer.zero_grad()

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

    begin, step, curve = time.perf_counter(), 0, []
    while (progress := (time.perf_counter() - begin) / (60 * minutes)) < 1:
        chat_rows = round(batch * CHAT_SHARE)
        window = torch.cat([chat.from_row_starts(chat_rows), text.from_anywhere(batch - chat_rows)])
        for group in optimizer.param_groups:
            group["lr"] = rate(progress)
        loss = step_loss(window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 1000 == 0:
            curve.append((step, round(loss.item(), 4)))
            print(f"step {step} loss {curve[-1][1]:.3f} {progress:.0%} held out {evaluate()}", flush=True)
        step += 1

    for parameter in model.parameters():  # what is measured below is what is shipped
        parameter.data = parameter.data.bfloat16().float()
    record = {
        "parameters": model.num_parameters(),
        "steps": step,
        "tokens": step * batch * CONTEXT,
        "minutes": minutes,
        "batch": batch,
        "held_out_loss": evaluate(),
        "loss": curve,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    save(model, tokenizer, output, record)
    print(json.dumps({k: v for k, v in record.items() if k != "loss"}), flush=True)


def save(model: LlamaForCausalLM, tokenizer, output: Path, record: dict) -> None:
    """Writes the model in bfloat16 under a config that asks for float32 arithmetic."""
    output.mkdir(parents=True, exist_ok=True)
    model.config.dtype = "float32"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(output)
    GenerationConfig(eos_token_id=1, pad_token_id=0).save_pretrained(output)
    tokenizer.save_pretrained(output)
    weights = {k: v.bfloat16().cpu().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
