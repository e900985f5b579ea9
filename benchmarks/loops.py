"""The loops that the core is compared with: what one writes without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from benchmarks.bench import AUGMENTATION, MOMENTUM, RATE, WEIGHT_DECAY
from common.core.data import Dataset
from common.core.trainer import Trainer

_PADDING = AUGMENTATION.crop_padding
_WARM_UP = 3


def usual(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """An epoch of the usual training loop: float32, torch.optim.SGD, loss and accuracy read in every step.

    The model is put on the device of its parameters; batches are brought there.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def epoch() -> None:
        model.train()
        loss_sum, correct = 0.0, 0
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()

    return epoch


class TensorBatches:
    """Normalised float32 images [N, C, H, W], padded once, in memory; cropped and flipped batch by batch, in random order."""

    def __init__(self, data: Dataset, batch: int):
        self.batch = batch
        images, self.labels = data.images["train"], data.labels["train"]
        mean, std = (torch.tensor(values, device=images.device) for values in (data.mean, data.std))
        # black borders, as PIL's crops have them
        padded = pad(images, (0, 0, *(_PADDING,) * 4))
        self.images = ((padded / data.scale - mean) / std).permute(0, 3, 1, 2).contiguous()
        self.shape = data.image_shape

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), device=self.labels.device)
        for index in order.split(self.batch):
            yield self._augmented(self.images[index]), self.labels[index]

    def _augmented(self, x: Tensor) -> Tensor:
        count, (channels, height, width) = len(x), self.shape
        rows, columns = torch.randint(2 * _PADDING + 1, (2, count, 1), device=x.device)
        rows = rows + torch.arange(height, device=x.device)
        columns = columns + torch.arange(width, device=x.device)
        flipped = torch.rand(count, 1, device=x.device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        image = torch.arange(count, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[:, None, None]
        return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def bare(trainer: Trainer, steps: int) -> Callable[[], None]:
    """`steps` steps on one fixed batch with the trainer's network, optimiser and precision, and nothing else.

    Where the core replays captured passes, the whole step is one captured graph.
    """
    images, labels = next(iter(trainer.batches.epoch(0)))
    model, optimizer = trainer.model.train(), trainer.optimizer
    for group in optimizer.param_groups:
        group["lr"] = RATE

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with trainer.compute.precision():
            logits = model(images)
        cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    once = _captured(step) if trainer.compute.captured else step

    def repeated() -> None:
        for _ in range(steps):
            once()

    return repeated


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(step: Callable[[], None] = step) -> None:
        # the graph reads the tensors that `step` holds, and does not hold them itself
        graph.replay()

    return replay
