"""Hugging Face causal language models as policies: the model, generation, rewards, data, and the sampler."""
