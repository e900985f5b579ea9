"""The profiles of `params.yaml`: which there are, which is selected, and what each says with all that it inherits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from common.reading import DEPTH, NAME_RULE, is_name, read_yaml, shown, words
from common.settings import PARAMS_FILE, SeedSettings, SettingsError, hint, merged, validated

_BESIDE_PROFILES = ("environment", "partial")
"""Folders of results that are of no profile."""


def selected_profile(file: str | os.PathLike = PARAMS_FILE) -> str:
    """The name of the profile that the file selects. Raises SettingsError."""
    return profile_blocks(file, None)[1]


def profile_chain(file: str | os.PathLike, profile: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """A profile and those that it extends, farthest first: name and settings, with the inherited ones.

    Raises SettingsError.
    """
    blocks, name = profile_blocks(file, profile)
    names, own = [name], []
    while True:
        where = f"{file}: profiles.{names[-1]}"
        block = {} if blocks[names[-1]] is None else blocks[names[-1]]
        if not isinstance(block, Mapping):
            raise SettingsError(f"{where} = {shown(block)}: must be a table")
        own.append({key: value for key, value in block.items() if key != "extends"})
        if "extends" not in block:
            break
        parent = block["extends"]
        if isinstance(parent, str) and parent in names:
            circle = " -> ".join([*names[names.index(parent) :], parent])
            others = [known for known in blocks if known not in names]
            raise SettingsError(
                f"{where}.extends = {parent!r}: a profile must not extend itself ({circle}); "
                f"allowed: {', '.join(others) or 'none'}"
            )
        if not isinstance(parent, str) or parent not in blocks:
            others = [known for known in blocks if known not in names]
            raise SettingsError(f"{where}.extends = {shown(parent)}: unknown profile; {hint(parent, others)}")
        if len(names) == DEPTH:
            raise SettingsError(
                f"{where}.extends = {parent!r}: more than {DEPTH} profiles extend one another"
            )
        names.append(parent)
    chain: list[tuple[str, dict[str, Any]]] = []
    for name, block in zip(reversed(names), reversed(own)):
        chain.append((name, merged(chain[-1][1], block) if chain else block))
    return chain


def profile_looks(file: str | os.PathLike, profile: str | None = None) -> tuple[int, ...]:
    """The planned looks of a profile (default: the one that the file selects); none if there is one. Raises SettingsError."""
    name, block = profile_chain(file, profile)[-1]
    seeds = block.get("seeds")
    planned = validated(SeedSettings, seeds, f"{file}: profiles.{name}.seeds").planned if seeds else ()
    return planned if len(planned) > 1 else ()


def profile_blocks(file: str | os.PathLike, profile: str | None) -> tuple[Mapping[str, Any], str]:
    """The blocks of all profiles, and the name of `profile` or else of the one that the file selects."""
    content = read_yaml(file)
    top = ["profile", "profiles"]
    if not isinstance(content, Mapping):
        raise SettingsError(f"{file}: must be a table with the keys {', '.join(top)}")
    for key in content:
        if key not in top:
            raise SettingsError(f"{file}: {words(key)}: unknown key; {hint(key, top)}")
    blocks = content.get("profiles")
    if not isinstance(blocks, Mapping) or not blocks:
        raise SettingsError(f"{file}: profiles = {shown(blocks)}: must be a table of profiles")
    for known in blocks:
        if not is_name(known):
            raise SettingsError(f"{file}: profiles: {shown(known)}: {NAME_RULE} (numbers in quotes)")
        if known in _BESIDE_PROFILES:
            raise SettingsError(f"{file}: profiles: {known!r}: results have a folder of this name already")
    name = profile if profile is not None else content.get("profile")
    if not isinstance(name, str) or name not in blocks:
        raise SettingsError(f"{file}: profile = {shown(name)}: unknown profile; {hint(name, list(blocks))}")
    return blocks, name
