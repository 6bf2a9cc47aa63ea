"""Which keys of transformers' configurations this program knows: another one may change what a model does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from model.formats.base import ConversionError


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


_GENERAL = _words(
    """architectures model_type transformers_version dtype torch_dtype _name_or_path _commit_hash auto_map id2label
    label2id num_labels problem_type finetuning_task return_dict use_return_dict output_hidden_states output_attentions
    torchscript use_bfloat16 use_cache tf_legacy_loss tie_word_embeddings tie_encoder_decoder is_encoder_decoder
    is_decoder add_cross_attention cross_attention_hidden_size chunk_size_feed_forward _attn_implementation
    _attn_implementation_internal attn_implementation _attn_implementation_autoset _experts_implementation_internal
    gradient_checkpointing max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tokenizer_class prefix bos_token_id pad_token_id eos_token_id sep_token_id
    decoder_start_token_id task_specific_params _output_attentions"""
)  # of every configuration, of today and of before: nothing of what a trained model makes of an image
_SIZES = _words(
    """image_size patch_size num_channels hidden_size num_hidden_layers num_attention_heads intermediate_size
    layer_norm_eps hidden_act hidden_dropout_prob attention_probs_dropout_prob attention_dropout dropout
    initializer_range initializer_factor"""
)
_BACKBONE = _words(
    """out_features out_indices _out_features _out_indices stage_names apply_layernorm reshape_hidden_states
    layerscale_value drop_path_rate num_register_tokens"""
)  # the first seven: of classes that give maps, not of those for features and for classes
TOWERS = _words(
    """vision_config text_config vision_config_dict text_config_dict projection_dim logit_scale_init_value
    initializer_factor"""
)
VIT = _SIZES | _words("qkv_bias encoder_stride pooler_output_size pooler_act")
SIGLIP = _SIZES | _words("vision_use_head")
SIGLIP2 = SIGLIP | _words("num_patches")
CLIP = _SIZES | _words("projection_dim")
_TEXT = _SIZES | _words("vocab_size max_position_embeddings eos_token_id")
CLIP_TEXT = _TEXT | _words("projection_dim")
SIGLIP_TEXT = _TEXT | _words("projection_size")
DINOV2 = (
    _SIZES
    | _BACKBONE
    | _words("mlp_ratio qkv_bias use_swiglu_ffn use_mask_token interpolate_antialias interpolate_offset")
)
DINOV3 = (
    _SIZES
    | _BACKBONE
    | _words(
        """rope_theta rope_parameters query_bias key_bias value_bias proj_bias mlp_bias use_gated_mlp pos_embed_shift
        pos_embed_jitter pos_embed_rescale"""
    )
)


def check_known(config: Mapping[str, Any], known: frozenset[str], where: str = "config.json") -> None:
    """Raise ConversionError for a key that is set and is none of `known`."""
    for key, value in config.items():
        if key not in known and key not in _GENERAL and value not in (None, False, 0, "", [], {}):
            raise ConversionError(
                f"{key} of {where} is {value!r:.80}, which this program does not know: remove it if it changes nothing"
            )
