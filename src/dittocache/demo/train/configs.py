"""The bundled model's parts, built untrained from their configurations."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION_PATCH = 16


def build_vae() -> AutoencoderKLQwenImage:
    """The VAE: 8x spatial compression to 16 channels, 2.6 M parameters."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def build_transformer(zero_cond_t: bool = True) -> QwenImageTransformer2DModel:
    """The diffusion transformer: 8 blocks of width 128, 4.9 M parameters, adaLN and output at zero."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        axes_dims_rope=(4, 14, 14),
        zero_cond_t=zero_cond_t,
    )
    # adaLN-zero (Peebles & Xie 2023, section 3.2): every block starts as the identity.
    outputs = [block.img_mod[1] for block in transformer.transformer_blocks]
    outputs += [block.txt_mod[1] for block in transformer.transformer_blocks]
    for linear in (*outputs, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The text encoder: 3 layers of width 128 behind a 2-layer vision tower of width 96."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "initializer_range": 0.05,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "patch_size": VISION_PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * VISION_PATCH,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.05,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    encoder.generation_config.pad_token_id = ids("<|endoftext|>")
    return encoder.to(torch.float32)


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """The image processor: patches of 16 pixels merged 2x2, so that 64x64 pixels are four image tokens."""
    return Qwen2VLImageProcessorPil(
        patch_size=VISION_PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's scheduler, with the shift of its 1024x1024 pictures (about 2) at our 64 tokens."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        use_dynamic_shifting=True,
        base_shift=0.7,
        max_shift=0.9,
        base_image_seq_len=64,
        max_image_seq_len=1024,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
