"""Adds configs/ to the installed package, as octvideo/configs; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["octvideo*"]), "octvideo.configs"],
    package_dir={"octvideo.configs": "configs"},
)
