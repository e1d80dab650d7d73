"""What pyproject.toml cannot say: configs/ is installed as visionzoo/configs; files that are no modules."""

from setuptools import find_namespace_packages, find_packages, setup

CONFIGS = ["visionzoo.configs", *(f"visionzoo.configs.{name}" for name in find_namespace_packages("configs"))]

setup(
    packages=[*find_packages(include=["visionzoo", "visionzoo.*"]), *CONFIGS],
    package_dir={"visionzoo.configs": "configs"},
    package_data={"visionzoo.kernels": ["*.csv"], **{name: ["*.yaml"] for name in CONFIGS}},
)
