"""How fast is it? One process for each network, which measures the card first.

With `fused` the first epoch compiles its kernels, unless the tests of the first step have: Triton keeps them on the disk.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.jobs import Job, failed, perform
from benchmarks.gpu.kit import Step
from benchmarks.gpu.network import scale

WEIGHTS = {"resnet20": 1.3, "resnet56": 1.3}
"""How much longer than others a network is measured: what matters most, and what takes longer steps."""


def measure(step: Step) -> None:
    """Measure the networks one after the other and keep the rows that they leave, as they go on."""
    logs, networks = step.kit.out / "speed-logs", scale(step.kit.quick).networks
    for old in logs.glob("*.log"):
        old.unlink()
    found: dict[str, list[dict[str, Any]]] = {}
    stopped: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        for number, network in enumerate(networks):
            weights = [WEIGHTS.get(name, 1.0) for name in networks[number:]]
            file = Path(folder) / f"{network}.jsonl"

            def keep(file: Path = file, network: str = network) -> None:
                found[network] = rows(file)
                step.keep({"networks": found, "stopped": stopped})

            options = ["--rows", str(file), "--device", step.kit.device, *["--quick"] * step.kit.quick]
            command = [sys.executable, "-m", "benchmarks.gpu.network", network, *options]
            ended = perform(
                [Job(network, lambda s: [*command, "--seconds", f"{s:.1f}"])],
                step.left * weights[0] / sum(weights),
                slots=1,
                cwd=Path(folder),
                logs=logs,
                variables=step.kit.variables,
                watch=keep,
            )
            stopped |= failed(ended, logs)
            keep()


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows that a process has left so far."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
