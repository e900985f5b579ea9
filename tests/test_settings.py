"""Settings: every wrong value is one clear error that names file, key, value and what is allowed."""

import pytest
import yaml
from pydantic import model_validator

from common.core.identity import canonical, digest, stream
from common.profiles import selected_profile
from common.reading import read_yaml
from common.settings import DatasetSettings, PaperSettings, SettingsError, Strict, Targets, validated
from common.stage.papers import load


class Item(Strict):
    name: str
    options: dict[str, int] = {}


class Example(PaperSettings):
    targets: Targets = (0.5,)
    dataset: DatasetSettings = DatasetSettings()
    items: tuple[Item, ...] | None = None

    @model_validator(mode="after")
    def _one_item_at_most(self):
        if self.items and len(self.items) > 1:
            raise ValueError("items must be one")
        return self


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"target": [0.5]}, ["f.yaml: a.target", "unknown key", "targets", "did you mean 'targets'"]),
        ({"targets": [0.5, 1.2]}, ["f.yaml: a.targets[1] = 1.2", "less than 1"]),
        ({"targets": "many"}, ["a.targets = 'many'", "tuple"]),
        ({"targets": [0.5, 0.5]}, ["a.targets", "repeat"]),
        ({"seeds": []}, ["a.seeds = []", "at least 1"]),
        ({"seeds": [-1]}, ["a.seeds[0] = -1", "greater than or equal to 0"]),
        ({"dataset": {"source": "stl10"}}, ["a.dataset.source = 'stl10'", "'digits'", "'cifar10'"]),
        ({"dataset": {"sorce": "digits"}}, ["a.dataset.sorce", "did you mean 'source'"]),
        ({"seeds": [0], "targets": [float("nan")]}, ["a.targets[0] = nan"]),
        ({"items": [{"nam": "x"}]}, ["a.items[0].nam: unknown key", "allowed: name, options", "'name'"]),
        ([1], ["a = [1]", "must be a table"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, parts):
    with pytest.raises(SettingsError) as error:
        validated(Example, values, "f.yaml: a")
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_rule_about_a_whole_table_does_not_repeat_the_table():
    with pytest.raises(SettingsError) as error:
        validated(Example, {"items": [{"name": "x"}, {"name": "y"}]}, "f.yaml: a")
    assert str(error.value) == "f.yaml: a: items must be one"


def test_every_wrong_value_is_named_not_only_the_first():
    with pytest.raises(SettingsError, match="seeds.*targets"):
        validated(Example, {"seeds": [], "targets": [2]}, "f.yaml: a")


def _params(tmp_path, **content):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_unknown_profile_paper_and_block_are_named(tmp_path):
    file = _params(tmp_path, profile="digit", profiles={"digits": {}})
    with pytest.raises(SettingsError, match="profile = 'digit'.*did you mean 'digits'"):
        load("halo", file)
    with pytest.raises(SettingsError, match="unknown paper 'hallo'.*did you mean 'halo'"):
        load("hallo", file, "digits")
    file = _params(tmp_path, profile="digits", profiles={"digits": {"hallo": {}}})
    with pytest.raises(SettingsError, match=r"profiles\.digits\.hallo: unknown key.*halo"):
        load("halo", file)
    with pytest.raises(SettingsError, match="profils: unknown key"):
        selected_profile(_params(tmp_path, profile="digits", profils={}))


def test_a_key_given_twice_and_broken_yaml_are_errors(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("profile: digits\nprofile: paper\n")
    with pytest.raises(SettingsError, match="'profile' is given twice"):
        read_yaml(file)
    file.write_text("profile: [\n")
    with pytest.raises(SettingsError, match="line 2"):
        read_yaml(file)
    with pytest.raises(SettingsError, match="absent.yaml: cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_the_digest_depends_on_content_and_not_on_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


def test_streams_are_repeatable_and_distinct():
    seeds = [
        stream(seed, name, epoch) for seed in range(5) for name in ("order", "init") for epoch in range(5)
    ]
    assert len(set(seeds)) == len(seeds)
    assert stream(3, "order", 1) == stream(3, "order", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
