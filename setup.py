import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return the version in share_hf/version.py, read as text: importing the package would need its dependencies."""
    path = ROOT / "share_hf" / "version.py"
    found = re.search(r'^__version__ = "([^"]+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f'{path}: no line of the form `__version__ = "1.2.3"`')
    return found.group(1)


def read_long_description() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


class SourceDistribution(sdist):
    """Adds the files that are neither code of the package nor its metadata, as a MANIFEST.in would."""

    folders = ("recipes", "tests", "model_cards", ".github", ".ci")

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        added = {
            path.relative_to(ROOT).as_posix()
            for folder in self.folders
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        super().make_release_tree(base_dir, sorted(added.union(name.replace("\\", "/") for name in files)))


# Ranges only. The exact versions that are tested together are in .github/constraints.txt.
install_requires = [
    "accelerate>=1.10",
    "datasets>=3.0",
    "huggingface_hub>=2.2",
    "jinja2>=3.1",  # the model card's template
    "numpy>=1.26",
    "peft>=0.21.2",
    "PyYAML>=6.0.1",
    "safetensors>=0.8",
    "torch>=2.8",
    "tqdm>=4.66.3",
    "transformers>=5.19",
]

extras_require = {
    "completion": ["argcomplete>=3.5"],  # of `share-hf` in the shell
    "demo": ["gradio>=6.31"],  # of recipes/demo
    "quantization": ["bitsandbytes>=0.45"],
    "deepspeed": ["deepspeed>=0.16"],
    "gguf": ["gguf>=0.18"],
    "metrics": ["scikit-learn>=1.4", "scipy>=1.11"],  # of recipes/text_stream.py
    "plots": ["matplotlib>=3.8"],
    "trl": ["trl>=1.0"],
    "vision": ["pillow>=10.0", "scikit-learn>=1.4"],  # of recipes/vision_stream.py
}
extras_require["all"] = sorted({requirement for extra in extras_require.values() for requirement in extra})
# Not in `all`: PEFT imports them wherever they are installed, and HQQ has no wheel.
extras_require["quantizers"] = ["hqq>=0.2.8", "torchao>=0.18"]
# Of .github/mkdocs.yml, which reads the sources alone: `pip install` these without the package to build the site.
extras_require["docs"] = [
    "mkdocs-llmstxt>=0.5",
    "mkdocs-material>=9.7",
    "mkdocs>=1.6",
    "mkdocstrings-python>=2.0",
    "mkdocstrings>=1.0",
    "ruff",  # it formats the signatures
]
extras_require["tests"] = [
    "argcomplete>=3.5",
    "build>=1.2",  # of tests/test_packaging.py
    "gradio>=6.31",
    "hypothesis",
    "ipykernel>=6.29",  # it and the next two run recipes/notebooks
    "matplotlib>=3.8",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "playwright",  # of tests/recipes/test_demo.py, with a Chromium of the system
    "pytest>=8.2",
    "pytest-timeout",
    "pytest-xdist",
    "PyYAML",
    "ruff",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "setuptools>=77",  # what `build` finds where it must not download it
    "tensorboard",
]
extras_require["dev"] = [*extras_require["tests"], "mypy>=1.15"]

setup(
    name="share-hf",
    version=read_version(),
    description="Continual learning with shared LoRA subspaces (Share) for the Hugging Face stack",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={"Paper": "https://arxiv.org/abs/2602.06043"},
    keywords="continual learning, LoRA, parameter-efficient fine-tuning, low-rank adapters, subspace, merging",
    # The command line is a package of its own, so that its --help does not wait for share_hf, which imports torch.
    packages=[
        *find_packages(include=["share_hf", "share_hf.*"], exclude=["share_hf.cli"]),
        "share_hf.model_cards",
        "share_hf_cli",
    ],
    package_dir={"share_hf": "share_hf", "share_hf.model_cards": "model_cards", "share_hf_cli": "share_hf/cli"},
    entry_points={
        "console_scripts": ["share-hf = share_hf_cli:main"],
        # It does nothing unless SHARE_HF_SUBSPACE is set.
        "vllm.general_plugins": ["share_hf_resolver = share_hf_cli.vllm_plugin:register_resolver"],
    },
    package_data={"share_hf": ["py.typed"], "share_hf.model_cards": ["*.jinja"]},
    cmdclass={"sdist": SourceDistribution},
    zip_safe=False,  # type checkers look for py.typed on disk
    python_requires=">=3.10",
    install_requires=install_requires,
    extras_require=extras_require,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
