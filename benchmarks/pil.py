"""The usual way to images: one by one through PIL in a DataLoader. Apart, since torchvision takes seconds to import."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.bench import AUGMENTATION
from common.core.data import Dataset


class PilImages(torch.utils.data.Dataset):
    """Images one by one through PIL, as torchvision's data sets do it."""

    def __init__(self, data: Dataset):
        self.images: np.ndarray = data.images["train"].cpu().numpy()
        self.labels: list[int] = data.labels["train"].tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.image_shape[1:], padding=AUGMENTATION.crop_padding),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(data: Dataset, batch: int, workers: int, pinned: bool) -> DataLoader:
    """The usual DataLoader; its worker processes stay from epoch to epoch."""
    return DataLoader(
        PilImages(data),
        batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
    )
