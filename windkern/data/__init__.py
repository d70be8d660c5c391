"""Prompt files of the demo, read through `windkern.train.data.loading.demo_prompts`."""
