from setuptools import setup

setup()  # for tools that still call it; everything is in pyproject.toml
