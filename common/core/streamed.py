"""Images that stay on disk because memory cannot hold them: read, checked and decoded batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader

from common.core.identity import stream
from common.core.pictures import read_image
from common.settings import DataError

# images that one process decodes before it hands them over: bounds the shared memory that large batches take
DECODED_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that stay on disk; takes the place of a uint8 tensor [N, size, size, 3].

    paths: [N] bytes, relative to root. digests: SHA-256 of each file, uint8 [N, 32]; every reading is checked by it.
    device: where decoded batches go.
    """

    root: Path
    paths: np.ndarray
    digests: np.ndarray
    size: int
    device: torch.device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the tensor."""
        return len(self.paths), self.size, self.size, 3

    def __getitem__(self, index: Tensor | np.ndarray) -> ImageFiles:
        chosen = torch.as_tensor(index).cpu().numpy()
        return replace(self, paths=self.paths[chosen], digests=self.digests[chosen])

    def to(self, device: torch.device | str) -> ImageFiles:
        """The same images, to be decoded for `device`."""
        return replace(self, device=torch.device(device))

    def batches(
        self, order: Tensor, batch_size: int, crops: int | None = None, flip: bool = False
    ) -> Iterator[Tensor]:
        """The images numbered `order`, uint8 [B, size, size, 3] on the device, decoded ahead by other processes.

        crops: seed of random resized crops, of which `flip` mirrors half; each depends on the seed and the image alone.
        Without it, centre crops of images resized to 256/224 of `size`. Raises DataError as `read_image`.
        """
        wanted = [batch.split(DECODED_AT_ONCE) for batch in order.cpu().split(batch_size)]
        loader: DataLoader[Tensor | DataError] = DataLoader(
            _Decoder(self, crops, flip),
            batch_size=None,
            sampler=[part.numpy() for parts in wanted for part in parts],
            num_workers=_decoders(self.device),
            pin_memory=self.device.type == "cuda",
            # its own, so that iterating leaves the global one as it is
            generator=torch.Generator(),
        )
        loaded = iter(loader)
        for parts in wanted:
            found = [next(loaded) for _ in parts]
            for part in found:
                if isinstance(part, DataError):
                    raise part
            yield torch.cat([part.to(self.device, non_blocking=True) for part in found])


class _Decoder(data.Dataset[Tensor | DataError]):
    """What the decoding processes do: numbers of images -> uint8 [B, size, size, 3], or the DataError."""

    def __init__(self, files: ImageFiles, crops: int | None, flip: bool):
        from torchvision import transforms

        self.files, self.crops = files, crops
        if crops is None:
            steps = [transforms.Resize(round(files.size * 256 / 224)), transforms.CenterCrop(files.size)]
        else:
            steps = [transforms.RandomResizedCrop(files.size)]
            steps += [transforms.RandomHorizontalFlip()] if flip else []
        self.change = transforms.Compose(steps)

    def __getitem__(self, numbers: np.ndarray) -> Tensor | DataError:
        try:
            return torch.from_numpy(np.stack([self._image(number) for number in numbers]))
        except DataError as error:  # raised here, it would arrive with a traceback for a message
            return error

    def _image(self, number: int) -> np.ndarray:
        files, digest = self.files, self.files.digests[number].tobytes()
        if self.crops is not None:
            torch.default_generator.manual_seed(stream(self.crops, digest.hex()))
        return np.asarray(self.change(read_image(files.root / os.fsdecode(files.paths[number]), digest)))


def _decoders(device: torch.device) -> int:
    """How many processes decode: a GPU's share of the cores, or one beside a run that trains on a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // torch.cuda.device_count()) if device.type == "cuda" else 1
