"""Slim large Mixture-of-Experts language models and train them back to strength, inside the Hugging Face loop."""

__version__ = "0.1.0"
