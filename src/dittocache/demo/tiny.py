"""Pipelines of the real classes with random weights, built in memory in a moment: for tests and conformance suites.

Their pictures are noise. Their outputs depend visibly on every input (prompt, references, timestep), so a test that
compares outputs notices a dropped or swapped input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dittocache.errors import ModelError
from dittocache.families.qwen_processor import StillImageProcessor

SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny_pipeline(family_name: str, *, zero_cond_t: bool = False, guidance: bool = True, seed: int = 0) -> Any:
    """A float32 CPU pipeline of the family of this name.

    Args:
        zero_cond_t: reference tokens modulated at t = 0, as in Qwen-Image-Edit-2511; only for Qwen.
        guidance: a guidance-distilled FLUX.1; False makes FLUX.1-dev FLUX.1-schnell.
        seed: the weights; the same seed gives the same weights.

    Raises ModelError for an unknown family.
    """
    builders: dict[str, Callable[[], Any]] = {
        "qwen-image": lambda: _qwen_text_to_image(zero_cond_t),
        "qwen-image-edit": lambda: _qwen_edit(QwenImageEditPipeline, zero_cond_t),
        "qwen-image-edit-plus": lambda: _qwen_edit(QwenImageEditPlusPipeline, zero_cond_t),
        "flux": lambda: _flux(FluxPipeline, guidance),
        "flux-schnell": lambda: _flux(FluxPipeline, guidance=False),
        "flux-kontext": lambda: _flux(FluxKontextPipeline, guidance),
    }
    if family_name not in builders:
        raise ModelError(f"no tiny pipeline of family {family_name!r}; there are {', '.join(builders)}")
    # The caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = builders[family_name]()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _enliven(component)
                component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny(folder: Path, family_name: str, **options: Any) -> Path:
    """Save `tiny_pipeline(family_name, **options)` as a `from_pretrained` folder, with stock class names; return it."""
    pipe = tiny_pipeline(family_name, **options)
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    if "processor" in content:
        content["processor"] = ["transformers", "Qwen2VLProcessor"]  # what a real checkpoint names
        index.write_text(json.dumps(content, indent=2) + "\n")
    return folder


def _enliven(module: nn.Module) -> None:
    """Give every matrix unit gain, so that signals neither die nor explode and gates and attention are at work."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=1.0)
    for name, weight in module.named_parameters():
        # Queries and keys longer than their norm makes them: else attention is a plain mean, and inputs drown in it.
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            nn.init.constant_(weight, 2.0)


def _qwen_vae() -> Any:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 16,
        latents_std=[1.5] * 16,
    )


def _qwen_transformer(zero_cond_t: bool) -> Any:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )


def _qwen_tokenizer(templates: list[str]) -> Any:
    vocabulary = {symbol: index for index, symbol in enumerate(ALPHABET)}
    letters = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    # Merges learnt on the prompt templates keep token counts near those of the real tokenizer.
    return letters.train_new_from_iterator(templates, 640, new_special_tokens=SPECIAL_TOKENS, show_progress=False)


def _qwen_text_encoder(tokenizer: Any) -> Any:
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 64,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)


def _qwen_edit(pipeline_class: Any, zero_cond_t: bool) -> Any:
    template = pipeline_class(*[None] * 6).prompt_template_encode
    tokenizer = _qwen_tokenizer([template, "Picture 1: Picture 2: make the circle red"])
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 1024 * 1024}
    )
    return pipeline_class(
        scheduler=_scheduler(),
        vae=_qwen_vae(),
        text_encoder=_qwen_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=StillImageProcessor(image_processor, tokenizer),
        transformer=_qwen_transformer(zero_cond_t),
    )


def _qwen_text_to_image(zero_cond_t: bool) -> Any:
    template = QwenImagePipeline(*[None] * 5).prompt_template_encode
    tokenizer = _qwen_tokenizer([template, "a red circle on a blue ground"])
    return QwenImagePipeline(
        scheduler=_scheduler(),
        vae=_qwen_vae(),
        text_encoder=_qwen_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=_qwen_transformer(zero_cond_t),
    )


def _flux(pipeline_class: Any, guidance: bool) -> Any:
    word_ends = {f"{symbol}</w>": len(ALPHABET) + index for index, symbol in enumerate(ALPHABET)}
    clip_vocabulary = {symbol: index for index, symbol in enumerate(ALPHABET)} | word_ends
    clip_vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    t5_vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    t5_vocabulary += [(chr(code), -3.0) for code in range(33, 127)]
    clip_config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    t5_config = T5Config(vocab_size=len(t5_vocabulary), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return pipeline_class(
        scheduler=_scheduler(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        text_encoder=CLIPTextModel(clip_config),
        tokenizer=CLIPTokenizer(vocab=clip_vocabulary, merges=[], model_max_length=77),
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=T5Tokenizer(vocab=t5_vocabulary, extra_ids=0),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ),
    )
