"""A small transformer that learns to write Python, one character at a time. ``stagecast demo`` trains it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from trainer import ModuleInterface, TrainerArguments, to_device
from trainer.examples.text import UNKNOWN, VOCABULARY, Blocks, Text, decode, encode


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """The size of the model and of its run."""

    width: int
    """Features of each character, C."""
    depth: int
    """Layers."""
    heads: int
    """Attention heads, H; each has D = C / H features."""
    context: int
    """Characters per block, T."""
    batch: int
    """Blocks of T characters in an optimizer step, B."""
    steps: int
    epochs: int
    max_lr: float


SMALL = Size(width=128, depth=3, heads=4, context=96, batch=24, steps=780, epochs=6, max_lr=4e-3)
"""For about a minute on two CPU cores."""

LARGE = Size(width=512, depth=8, heads=8, context=256, batch=128, steps=1_500, epochs=6, max_lr=1e-3)
"""For a GPU."""

_VALIDATION_BLOCKS = 256


class Layer(nn.Module):
    """Causal self-attention, then a perceptron at each character, both with residual connections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, T, C)`` to ``(B, T, C)``; a character attends to itself and to earlier ones."""
        batch, time, width = x.shape
        joint = self.queries_keys_values(self.attention_norm(x))  # (B, T, 3 C)
        split = joint.view(batch, time, 3, self.heads, width // self.heads)  # (B, T, 3, H, D)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # 3 times (B, H, T, D)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        joined = attended.transpose(1, 2).reshape(batch, time, width)  # (B, T, H, D) -> (B, T, C)
        x = x + self.mix(joined)
        after: torch.Tensor = x + self.perceptron(x)
        return after


class Transformer(nn.Module):
    """A decoder that predicts the next character at each position."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.context = size.context
        self.characters = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.neighbours = nn.Conv1d(size.width, size.width, kernel_size=4)
        self.layers = nn.Sequential(*(Layer(size.width, size.heads) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        nn.init.normal_(self.positions.weight, std=0.1)
        nn.init.zeros_(self.head.weight)  # the first prediction is uniform

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens ``(B, T)`` int64 to logits ``(B, T, V)`` of the character after each; T up to ``context``."""
        characters = self.characters(tokens)  # (B, T, C)
        # A character and the three before it. Attention would learn this, too, but not within a minute.
        before = functional.pad(characters.transpose(1, 2), (3, 0))  # (B, C, 3 + T)
        neighbours = self.neighbours(before).transpose(1, 2)  # (B, C, T) -> (B, T, C)
        positions = self.positions(torch.arange(tokens.shape[1], device=tokens.device))  # (T, C)
        logits: torch.Tensor = self.head(self.norm(self.layers(characters + neighbours + positions)))  # (B, T, V)
        return logits


class CharLM(ModuleInterface):
    """The transformer with its data, its optimizer and its steps.

    Args:
        text: The training and validation text.
        size: The size of the model and of its run.
    """

    def __init__(self, text: Text, size: Size) -> None:
        super().__init__()
        self.size = size
        self.net = Transformer(size)
        self._train_blocks = Blocks(text.train, size.context)
        self._val_blocks = Blocks(text.val, size.context, most=_VALIDATION_BLOCKS)

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int, epochs: int
    ) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        """AdamW that decays only the matrices, and one cycle of the learning rate over the whole run."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=self.size.max_lr,
            betas=(0.9, 0.98),
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.size.max_lr,
            total_steps=max(2, estimated_global_steps_per_epoch * epochs),
            pct_start=0.1,
            cycle_momentum=False,
        )
        return [optimizer], [schedule]

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> DataLoader[torch.Tensor]:
        """Blocks ``(B, T + 1)`` uint8 in the run's order."""
        blocks = self._train_blocks
        return DataLoader(blocks, batch_size=batch_size, sampler=sampler(blocks), drop_last=True)

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> DataLoader[torch.Tensor]:
        """Blocks spread over the validation files."""
        blocks = self._val_blocks
        return DataLoader(blocks, batch_size=batch_size, sampler=sampler(blocks))

    def train_step(self, global_step: int, batch: torch.Tensor, device: torch.device | str | int) -> torch.Tensor:
        """The mean cross entropy per character, in nats."""
        return self._loss(batch, device)

    def val_step(self, global_step: int, batch: torch.Tensor, device: torch.device | str | int) -> torch.Tensor:
        """The same on the validation text; also logged in bits per character (an indent counts as one)."""
        loss = self._loss(batch, device)
        self.log("val_bpc", loss / math.log(2))
        return loss

    def _loss(self, batch: torch.Tensor, device: torch.device | str | int) -> torch.Tensor:
        tokens = to_device(batch, device).long()  # (B, T + 1)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T) each
        logits = self.net(inputs)  # (B, T, V)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def write(self, prompt: str, length: int, *, temperature: float = 0.8, seed: int = 0) -> str:
        """Continue a prompt by ``length`` characters, sampled from the model.

        Args:
            temperature: Below 1 it prefers likely characters.
            seed: Of its own generator, because a hook must not use the global ones.
        """
        device = next(self.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        tokens = encode(prompt.encode() or b"\n").long()  # (N,)
        training = self.training
        self.eval()
        for _ in range(length):
            seen = tokens[-self.size.context :].unsqueeze(0).to(device)  # (1, T)
            # SYNC: each character is drawn on the host; no step calls this
            logits = self.net(seen)[0, -1].float().cpu() / temperature  # (V,)
            logits[UNKNOWN] = -math.inf
            drawn = torch.multinomial(logits.softmax(0), 1, generator=generator)  # (1,)
            tokens = torch.cat((tokens, drawn))
        self.train(training)
        return decode(tokens)


def size_for(device: torch.device) -> Size:
    """The size for about a minute of training on a device."""
    return SMALL if device.type in ("cpu", "mps") else LARGE


def arguments_for(size: Size, device: torch.device, *, steps: int | None = None, seed: int = 0) -> TrainerArguments:
    """The arguments of a run of ``steps`` optimizer steps (None: the size's own), split into the size's epochs.

    A pass over the whole text would take minutes, so an epoch ends, and validates, after its share of the steps.
    """
    steps = size.steps if steps is None else steps
    epochs = min(size.epochs, steps)
    return TrainerArguments(
        epochs=epochs,
        max_train_steps_per_epoch=math.ceil(steps / epochs),
        max_steps=steps,
        train_batch_size=size.batch,
        clip_grads=True,
        precision="bfloat16" if device.type == "cuda" else "float32",
        device=str(device),
        seed=seed,
    )
