"""Made-up papers with records, curves and claims, as real stages leave them, to draw reports from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

TARGETS = (0.5, 0.8, 0.9, 0.95, 0.98)
SEEDS = tuple(range(10))
DENSE = 23_726
MACS = 612_000


class Maker:
    """Writes the files of one paper in the `results` and `replications` below `folder`."""

    def __init__(self, folder: Path, paper: str):
        self.folder, self.paper = folder, paper
        self.records: list[dict] = []
        self.curves: list[dict] = []
        self._random = np.random.default_rng(sum(paper.encode()))

    def run(self, variant: str, target: float, seed: int, accuracy: float | None, **extra) -> dict:
        """Add one run; an accuracy of None makes it a failed one. extra: fields of the record to set."""
        identity = {
            "paper": self.paper,
            "variant": variant,
            "dataset": extra.pop("dataset", "digits"),
            "architecture": extra.pop("architecture", "convnet"),
            "target": target,
            "seed": seed,
        }
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        record = {
            **identity,
            "status": "ok",
            "settings": {"epochs": 30},
            "settings_hash": digest,
            "details": {},
        }
        if accuracy is None:
            record |= {
                "status": "failed",
                "reason": "the loss is nan in epoch 3 of phase retrain",
                "metrics": {},
                "cost": {},
            }
        else:
            left = (1 - target) ** 0.8
            kept = round((DENSE - 500) * (1 - target)) + 500
            record["metrics"] = {
                "test_accuracy": accuracy,
                "test_loss": 2 * (1 - accuracy),
                "validation_accuracy": accuracy,
            }
            record["cost"] = {
                "parameters": DENSE,
                "nonzero_parameters": kept,
                "dense_parameters": DENSE,
                "macs": MACS,
                "sparse_macs": round(MACS * left),
                "dense_macs": MACS,
                "compression": DENSE / kept,
                "theoretical_speedup": 1 / left,
            }
        record |= extra
        self.records.append(record)
        self.curves.append({"settings_hash": digest, "curves": self._epochs(target, accuracy)})
        return record

    def grid(
        self,
        variants: Sequence[str],
        targets: Sequence[float] = TARGETS,
        seeds: Sequence[int] = SEEDS,
        **extra,
    ) -> None:
        """A dense run a seed, and each variant at each target; a later variant breaks at a higher target."""
        for seed in seeds:
            level = 0.975 + 0.004 * self._random.standard_normal()
            self.run("dense", 0.0, seed, round(level, 4), **extra)
            for number, variant in enumerate(variants):
                for target in targets:
                    beyond = -math.log2(1 - target) - 4.4 - 1.6 * number / len(variants)
                    noise = 0.003 * (1 + max(0.0, beyond + 1) ** 2) * self._random.standard_normal()
                    accuracy = (
                        level / (1 + math.exp(1.7 * beyond)) + 0.1 / (1 + math.exp(-1.7 * beyond)) + noise
                    )
                    self.run(variant, target, seed, round(min(max(accuracy, 0.05), 0.999), 4), **extra)

    def _epochs(self, target: float, accuracy: float | None) -> list[dict]:
        rows = []
        phases = ["train"] * 30 if target == 0 else ["prune"] * 2 + ["retrain"] * 8
        for epoch, phase in enumerate(phases if accuracy is not None else phases[:3]):
            risen = 1 - 0.7 * math.exp(-5 * epoch / len(phases))
            noise = 0.005 * float(self._random.standard_normal())
            row = {
                "phase": phase,
                "epoch": epoch,
                "lr": 0.1,
                "train_loss": 2.4 * math.exp(-5 * epoch / len(phases)) + 0.02,
            }
            row |= {"train_accuracy": risen, "validation_accuracy": (accuracy or 0.3) * risen + noise}
            rows.append(row)
        return rows

    def claims(self, claims: Sequence[Mapping], readme: str | None = None, **more) -> None:
        """Write the paper's folder. more: what stands beside the claims in their file."""
        folder = self.folder / "replications" / self.paper
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "claims.yaml").write_text(
            yaml.safe_dump({"paper": self.paper, "claims": list(claims), **more})
        )
        if readme is not None:
            (folder / "README.md").write_text(readme)

    def write(self, environment: bool = True) -> None:
        """Write records, curves and the file about the machine."""
        results = self.folder / "results" / "digits"
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{self.paper}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in self.records)
        )
        (results / f"{self.paper}.curves.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in self.curves)
        )
        if environment:
            beside = self.folder / "results" / "environment" / "digits"
            beside.mkdir(parents=True, exist_ok=True)
            seconds = {record["settings_hash"]: 0.8 for record in self.records}
            machine = {
                "machine": {"device": "x86_64", "cores": 2},
                "versions": {"python": "3.11.9"},
                "seconds": seconds,
            }
            (beside / f"{self.paper}.json").write_text(json.dumps(machine))


def claim(id: str, treatment: str, control: str | Mapping | Sequence[str] | None, **extra) -> dict:
    """A superiority claim on test accuracy, with other fields as given (None removes one)."""
    if control is not None and not isinstance(control, Mapping):
        control = [{"variant": name} for name in ([control] if isinstance(control, str) else control)]
    found = {
        "id": id,
        "statement": f"{treatment} reaches a higher accuracy than what it is compared with.",
        "treatment": {"variant": treatment},
        "control": control,
        "metric": "test_accuracy",
        "test": "superiority",
        "direction": "higher",
        "scale": "points",
    }
    return {key: value for key, value in (found | extra).items() if value is not None}
