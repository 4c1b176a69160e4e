"""Plans: what a model's KV takes, and what each deployment makes of a GPU's memory, without an
engine. The policies' own layouts and limits are asked; vLLM's arithmetic is followed."""
