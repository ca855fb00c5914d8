"""Carry large language models between Hugging Face and Megatron."""

__version__ = "0.1.0"
