"""Packages and their data; everything else stands in pyproject.toml.

`data/` stays at the top of the repository and is installed as `diagnostics/assets`. It has no
`__init__.py` and another name than its package, so that package discovery alone cannot find it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["diagnostics", "diagnostics.*"]), "diagnostics.assets"],
    package_dir={"diagnostics.assets": "data"},
    include_package_data=False,  # exactly what the next line names
    package_data={
        "diagnostics": ["py.typed", "*.pyi", "**/static/*"],
        "diagnostics.assets": ["**/*"],
    },
)
