"""A trained network of convolutions that is no model of transformers, on the images that it was trained for."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress.quantization.modules import packed_modules, unpack

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions and a shortcut without weights (He et al. 2015, option A)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        fill = (y.shape[1] - x.shape[1]) // 2
        return functional.relu(y + functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, fill, fill)))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def images(real_data: Path) -> tuple[Tensor, Tensor]:
    stored = np.load(real_data / "vision" / "cifar10_train4000_lossless.npz", allow_pickle=False)
    pixels = torch.from_numpy(stored["x"][:1000]).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1), torch.from_numpy(
        stored["y"][:1000].astype(np.int64)
    )


@pytest.fixture(scope="module")
def network(real_data: Path) -> nn.Module:
    state = torch.load(real_data / "models" / "cifar10_resnets" / "resnet20-12fca82f.th", "cpu", weights_only=True)
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
    return model.eval()


def accuracy(model: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(images[0]).argmax(1) == images[1]).double().mean())


@pytest.mark.parametrize(
    ("bits", "codec", "lost"),
    [(8.04, "integer:group=0", 0.002), (4.2, "integer:group=0", 0.02), (4.2, "half_pyramid", 0.01)],
)
def test_accuracy_stays(
    network: nn.Module, images: tuple[Tensor, Tensor], bits: float, codec: str, lost: float
) -> None:
    original = accuracy(network, images)
    assert original > 0.99
    model = compress.quantize(copy.deepcopy(network), bits=bits, codec=codec)
    assert len(packed_modules(model)) == 18
    found = accuracy(model, images)
    assert found >= original - lost
    assert accuracy(unpack(model, torch.float32), images) == found
