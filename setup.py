"""The install: what perl_jax needs, what it brings along and the command it adds."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.+)'$", (HERE / 'perl_jax/__init__.py').read_text(), re.MULTILINE).group(1)
README = HERE / 'README.md'

HF = ['tokenizers>=0.22', 'safetensors>=0.6', 'gguf>=0.17', 'huggingface_hub>=1.0', 'jinja2>=3.1']
TPU = ['jax[tpu]']  # libtpu: on a TPU it runs programs, elsewhere it compiles them
CUDA = ['jax[cuda12]']  # with NVIDIA's libraries, so that the machine only needs its driver
# Tasks from the hub, from Parquet files and from TFDS, which needs importlib_resources and does not say so.
DATASETS = ['datasets>=3', 'pyarrow', 'importlib_resources']

setup(
    name='perl_jax',
    version=VERSION,
    description='PERL: parameter efficient reinforcement learning from human feedback, in JAX',
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    author='The perl_jax authors',
    license='Apache-2.0',
    # The repository's own address joins these, and CITATION.cff, before the first release: CONTRIBUTING.md.
    project_urls={'Paper': 'https://arxiv.org/abs/2403.10704'},
    python_requires='>=3.11',
    # tasks/ and gin/ stand beside the library in a checkout. The symlinks perl_jax/tasks and perl_jax/gin make them a
    # part of the package, under one name, in a checkout, an editable install and a wheel alike.
    packages=find_packages(include=['perl_jax', 'perl_jax.*']),
    package_data={'perl_jax': ['gin/**/*.gin', 'py.typed']},
    include_package_data=False,
    zip_safe=False,
    entry_points={'console_scripts': ['perl_jax = perl_jax.cli.main:cli']},
    install_requires=[
        'absl-py>=2.1',
        'annotated-types>=0.7',
        'clu>=0.0.12',
        'etils>=1.9',  # paths in a bucket; Orbax asks for its epath
        'filelock>=3.12',  # JAX's cache of compiled programs asks for it
        'flax>=0.12.2',
        'gin-config>=0.5',
        'httpx2>=2.16.2',
        'jax>=0.10',
        'jaxtyping>=0.3',
        'matplotlib>=3.9',  # the plots of a sweep
        'numpy>=2.0',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11.34',
        'pydantic>=2.9',
        'seqio>=0.0.20',  # brings TensorFlow and tensorflow-text
        'tensorboard>=2.19',  # clu writes events with it, and TensorFlow no longer brings it
        'tqdm>=4.66',
    ],
    extras_require={
        'cuda': CUDA,
        'tpu': TPU,
        'plan': TPU,
        'hf': HF,
        'datasets': DATASETS,
        'docs': ['mkdocs>=1.6,<2', 'mkdocstrings[python]>=1.0', 'ruff'],  # ruff breaks the lines of signatures
        # T5X is no extra: no index has it, and an index takes no metadata with a URL. requirements-t5x.txt names it.
        'test': [
            *HF,
            *TPU,
            'basedpyright>=1.40,<1.41',  # another minor version may find other errors
            'beartype',
            'importlib_resources',
            'pyarrow',
            'pytest>=8',
            'pytest-cov',
            'pytest-xdist',
            'pyyaml',
            'ruff',
            'scikit-learn',
            'setuptools>=70.1',  # tests/test_wheel.py builds a wheel offline
        ],
    },
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)
