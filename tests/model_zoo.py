"""Build a tiny random model of every causal LM that transformers maps, including image-text models, for text only."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

VOCAB = 160
LARGEST = 9_000_000  # parameters; a model whose configuration does not shrink counts as not built
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
    "layers",
)
_LAYERS += ("num_decoder_layers", "num_encoder_layers", "num_blocks", "resampler_depth")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
# Sizes by the names in configurations; a smaller default is kept.
_SIZES = {
    32: "hidden_size d_model n_embd dim attention_hidden_size embed_dim word_embed_proj_dim embedding_size width "
    "hidden_dim encoder_hidden_size out_hidden_size text_hidden_size projection_dim projector_hidden_size "
    "projection_hidden_dim output_dim image_text_hidden_size decoder_hidden_size adapter_out_dim "
    "downsample_hidden_size vision_output_dim patch_embed_hidden_size hidden_size_global "
    "projector_input_dim projector_output_dim image_token_embed_dim",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner mlp_dim ffn_hidden_size dim_ff "
    "intermediate_size_mlp dense_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size alignment_intermediate_size "
    "projection_intermediate_size merged_hidden_size",
    16: "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size kv_lora_rank q_lora_rank index_head_dim "
    "state_size mamba_d_state ssm_state_size mamba_chunk_size laurel_rank hidden_size_per_layer_input o_lora_rank "
    "router_hidden_size hc_lowrank rel_extent",
    4: "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads n_heads attention_heads "
    "linear_num_heads swa_num_attention_heads resampler_n_heads index_n_heads linear_num_value_heads num_local_experts "
    "n_routed_experts num_experts moe_num_experts num_encoder_attention_heads num_decoder_attention_heads",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "moe_topk moe_k num_experts_per_token moe_top_k",
    1: "n_group topk_group num_expert_group",
    8: "head_dim kv_channels linear_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim resampler_head_dim "
    "dim_head d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim time_step_rank mamba_dt_rank rotary_dim sliding_window "
    "sliding_window_size attention_chunk_size local_attention",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length posemb_grid_size_",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    28: "image_size",
    14: "patch_size",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
_SPECIAL |= {"sep_token_id": 3, "mask_token_id": 3, "eod_token_id": 3}
# Scales and caps whose defaults would have no visible effect.
_SHOWN = {
    "logits_scaling": 3.0,
    "logit_scale": 0.25,
    "lm_head_multiplier": 0.5,
    "output_multiplier": 0.3,
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "logits_mup_width_multiplier": 4.0,
    "unpadded_vocab_size": 150,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4 = {**_TWO_KINDS, "num_kv_shared_layers": 0, "head_dim": 8, "global_head_dim": 8}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2}
_MROPE = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_VQ = {
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "attn_resolutions": None,
    "resolution": 16,
}
_IMAGE_TOKENS = {"<image>": VOCAB - 2, **{f"IMGIMG{chr(65 + k)}Z": 121 + k for k in range(16)}}
# Further settings that a configuration needs, by model type.
_SPECIALS: dict[str, dict[str, object]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {**_TWO_KINDS, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCAB,
    },
    "xlm": {"emb_dim": 32, "n_words": VOCAB, "causal": True},
    "xlstm": {"num_heads": 4, "hidden_size": 32, "chunk_size": 4, "mode": "inference"},
    "xmod": {"default_language": "en_XX"},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "zamba": {**_ZAMBA, "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {
        **_ZAMBA,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "adapter_rank": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "cohere_compass_text": {"head_dim": 8, "rope_parameters": _MROPE},
    "cohere_compass": {"text_config": {"head_dim": 8, "rope_parameters": _MROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "first_k_dense_replace": 1},
    "qwen4_exp_text": _QWEN4,
    "chameleon": {"vocabulary_map": _IMAGE_TOKENS, "vq_config": {**_VQ, "num_embeddings": 16}},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "attn_layers": ["local", "lsh"],
        "hash_seed": 1,  # otherwise two calls hash differently
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "musicgen": {"num_codebooks": 4},
    "musicgen_melody": {"num_codebooks": 4},
    "paddleocr_vl": {"text_config": {"head_dim": 8, "rope_parameters": _MROPE["full_attention"]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 150, "vision_end_token_id": 149},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 150, "vision_end_token_id": 149},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_MROPE["full_attention"], "mrope_section": [1, 1, 2]}}},
    "mistral4": {"head_dim": 16},
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "deepseek_ocr2": {
        "text_config": {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "emu3": {"vocabulary_map": _IMAGE_TOKENS, "vq_config": {"codebook_size": 16, "base_channels": 32}},
    "janus": {"vq_config": {**_VQ, "num_embeddings": 16}},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 16},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
}


def entries() -> dict[str, str]:
    """Yield model types and class names of MODEL_FOR_CAUSAL_LM_MAPPING, then those only for images and text."""
    found: dict[str, str] = {}
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        known = set(found.values())
        for kind, name in names.items():
            name = name if isinstance(name, str) else name[0]
            if name not in known:
                found[kind if kind not in found else f"{kind}, images"] = name
    return found


def _depth(given: Mapping[str, object]) -> tuple[int, list[int]]:
    """Return the number of layers of a default configuration, and those of a small one: each kind, at least two."""
    depth = next((given[name] for name in _LAYERS if isinstance(given.get(name), int)), 0)
    kinds = next((given[name] for name in _KINDS if isinstance(given.get(name), list) and given[name]), [])
    if len(kinds) != depth:
        return depth, [0, 1]
    kept = [place for place, kind in enumerate(kinds) if kind not in kinds[:place]]
    return depth, kept if len(kept) > 1 else [0, 1]


def _rope(config: PreTrainedConfig, given: Mapping[str, object], out: dict[str, object]) -> None:
    """Set sections of rotary positions that sum to half the size of a small head."""
    rope = copy.deepcopy(given["rope_parameters"])
    if "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()):
        rope.setdefault("mrope_section", True)  # the model has default sections if the configuration has none
    for each in (rope, *rope.values()):
        if not isinstance(each, dict):
            continue
        if each.get("mrope_section"):
            part = each.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0
            if "head_dim" in given:
                out["head_dim"] = int(8 / part)
            elif part != 1:
                out |= {"num_attention_heads": 2, "num_key_value_heads": 1}
            each["mrope_section"] = [2, 1, 1]
        if each.get("original_max_position_embeddings"):
            each["original_max_position_embeddings"] = 32
    out["rope_parameters"] = rope


def _small(config: PreTrainedConfig) -> dict[str, object]:
    """Return the arguments that make a small configuration of this class."""
    given, out = config.to_dict(), {}
    depth, kept = _depth(given)
    spare = VOCAB - 1
    for name, value in given.items():
        part = vars(config).get(name)  # some attributes differ between layers and cannot be read
        if isinstance(part, PreTrainedConfig):
            out[name] = {**({"model_type": part.model_type} if part.model_type else {}), **_small(part)}
        elif name in _LAYERS and isinstance(value, int):
            out[name] = len(kept)
        elif isinstance(value, (list, tuple)) and depth > 2 and len(value) == depth:
            out[name] = [value[place] for place in kept]
        elif name in _SPECIAL:
            out |= {} if value is None else {name: [2] if isinstance(value, list) else _SPECIAL[name]}
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB:
            out[name], spare = spare, spare - 1
        elif name in _SIZE_OF and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            out[name] = VOCAB if _SIZE_OF[name] == VOCAB else min(value, _SIZE_OF[name])
        elif name in _SHOWN and value is not None:
            out[name] = _SHOWN[name]
    if isinstance(given.get("rope_parameters"), dict):
        _rope(config, given, out)
    if "qk_nope_head_dim" in given and "num_key_value_heads" in given:
        out["num_key_value_heads"] = out["num_attention_heads"]
    return out


def _merge(into: dict, other: Mapping) -> dict:
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(into.get(name), dict) and name != "rope_parameters"
        into[name] = _merge(into[name], value) if both else value
    return into


def build(kind: str, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a random model in eval mode, with logits of several nats and nonzero biases.

    Args:
        kind, name: as in `entries`.

    Raises:
        Exception: of any kind; transformers cannot build it, or not as small.
    """
    kind = kind.removesuffix(", images")
    model_class, config_class = getattr(transformers, name), CONFIG_MAPPING[kind]
    if not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class
    given = _merge(_small(config_class()), _SPECIALS.get(config_class.model_type, _SPECIALS.get(kind, {})))
    config = config_class(**given)
    config._attn_implementation = "eager"
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"), contextlib.suppress(RuntimeError):  # some need numbers while they are built
        size = sum(each.numel() for each in model_class(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    return _lively(model_class(config)).to(dtype).eval()


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    for name, value in model.named_parameters():
        if value.dim() == 1 and name.endswith("bias") and not value.any():
            value.normal_(std=0.1)
        elif value.dim() == 2 and float(value.std()) < 0.05:
            value.mul_(5)  # so that tokens attend to each other
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.weight.normal_(std=3 / head.in_features**0.5)
        if head.bias is not None:
            head.bias.normal_()
    return model
