"""What pyproject.toml cannot say: configs/ is the package visionzoo.configs, of files that are no modules."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["visionzoo", "visionzoo.*"]), "visionzoo.configs"],
    package_dir={"visionzoo.configs": "configs"},
    package_data={"visionzoo": ["py.typed"], "visionzoo.configs": ["*/*.yaml", "*/*.py", "*/_base_/*.py"]},
)
