"""Names that other tools use for keys of a settings file, so that a hint finds the key that is meant."""

from __future__ import annotations

_NAMES = {
    "attention": ("attn_implementation",),
    "dtype": ("torch_dtype",),
    "eval_dataset": ("eval_prompts", "heldout", "heldout_prompts", "test_dataset"),
    "judge": ("reward_funcs", "reward_model"),
    "learning_rate": ("lr",),
    "loss_kwargs": ("beta", "eta", "loss_arguments", "loss_settings", "objective"),
    "mask_truncated_completions": ("truncated",),
    "max_completion_length": ("max_length", "max_new_tokens", "max_response_length", "max_tokens"),
    "model": ("model_name", "model_name_or_path", "policy"),
    "num_generations": ("n_responses", "num_responses", "num_return_sequences", "num_samples"),
    "num_iterations": ("epochs", "iterations", "num_epochs"),
    "peft": ("lora", "lora_config", "peft_config"),
    "per_device_train_batch_size": ("batch_size", "train_batch_size"),
    "quantization": ("load_in_4bit", "load_in_8bit", "quantization_config"),
    "ref_model": ("reference_model",),
    "system": ("system_prompt",),
    "train_dataset": ("dataset", "dataset_name", "prompts", "train_data", "train_prompts"),
}
FOREIGN = {other: name for name, others in _NAMES.items() for other in others}
