"""The build backend: setuptools, for editable installs alone.

The project is run from its clone, beside dvc.yaml and params.yaml. A wheel would put packages called `common` and
`replications` among those of other people and leave the pipeline behind.
"""

from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "prepare_metadata_for_build_editable",
]


def build_wheel(*_: object, **__: object) -> str:
    """What PEP 517 asks for; also what is called for an install that is not editable."""
    raise SystemExit(
        "error: pruning-replications is not built as a package: "
        "clone its repository and run `pip install --editable .` there (or `make test`, which does so)"
    )


build_sdist = build_wheel
