"""Prompt files of the demo, read through `windkern.train.data.demo_prompts`."""
