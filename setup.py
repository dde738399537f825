"""Packaging: kernels/ lies at the top level and is installed as adabatch.kernels."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

EXAMPLES = ["scikit-learn", "matplotlib", "tqdm"]
TEST = [
    *EXAMPLES,
    *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy"),
    *("bs-scheduler", "linearlr", "transformers", "triton>=3.7.1; platform_system == 'Linux'"),
]

setup(
    name="adabatch",
    version="0.2.0",
    description="Training that chooses its own batch size, from the variance of the gradient.",
    author="the adabatch developers",
    keywords="pytorch, batch size, gradient noise scale, gradient variance, per-sample gradients",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["adabatch", "adabatch.*"]),
        "adabatch.kernels", *(f"adabatch.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"adabatch.kernels": "kernels"},
    package_data={"adabatch": ["py.typed"]},
    install_requires=["torch>=2.9", "numpy", "scipy"],
    extras_require={
        "examples": EXAMPLES,
        "triton": ["triton>=3.7.1; platform_system == 'Linux'"],
        "test": TEST,
        # Cockpit imports pkg_resources.
        "bench": ["opacus", "backpack-for-pytorch", "cockpit-for-pytorch", "setuptools<81"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
