"""Packaging that pyproject.toml cannot express: the top-level folder `kernels/` installs as `retainops.kernels`.

The name `kernels` on the package index belongs to another library, so the folder has no `__init__.py` and is
never importable as a package of its own; a relative symlink gives the same name to a source checkout.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["retainops", "retainops.*"]), "retainops.kernels"],
    package_dir={"retainops.kernels": "kernels"},
    package_data={"retainops": ["py.typed", "*.pyi"]},
)
