"""Stage `tokenizer`: a byte-level BPE in which every word of the task and of the prompt templates is one token."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from dittocache.demo.edits import GRAYS, NEW_INSTRUCTION, PHRASES, instructions
from dittocache.demo.scenes import COLOURS, SHAPES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2's own split into words, so that the stock tokenizer class reads our vocabulary as it reads the real one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prompt_templates() -> dict[str, tuple[str, int]]:
    """The (template, number of prefix tokens dropped) of the stock Edit-Plus and text-to-image pipelines."""
    found = {}
    for name, pipeline in (("edit_plus", QwenImageEditPlusPipeline), ("text_to_image", QwenImagePipeline)):
        # The template is an instance attribute set in __init__; nothing else of the pipeline is needed for it.
        bare = pipeline.__new__(pipeline)
        bare.register_modules = lambda **_: None
        pipeline.__init__(bare, *[None] * (6 if name == "edit_plus" else 5))
        found[name] = (bare.prompt_template_encode, bare.prompt_template_encode_start_idx)
    return found


def corpus() -> list[str]:
    """Every text that must be covered: templates, instructions, captions."""
    texts = [template for template, _ in prompt_templates().values()]
    for kind in PHRASES:
        texts += instructions(kind)
    texts += [NEW_INSTRUCTION, "Picture 1: Picture 2: Picture 3: ", " ".join(GRAYS)]
    texts += [f"a {colour} {shape} and a {colour} ground with it empty" for colour in COLOURS for shape in SHAPES]
    return texts


def train_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Train the BPE until no word of the corpus is split, and save it as a `Qwen2Tokenizer`."""
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    texts = corpus()
    for special in SPECIAL_TOKENS:
        texts = [text.replace(special, "\0") for text in texts]
    pieces = [piece for text in texts for piece in text.split("\0")]
    # Words at the start of an instruction stand after a colon and a special token, hence without a space too.
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging ends when every word is whole
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(pieces, trainer)
    state = json.loads(raw.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=state["vocab"], merges=merges, unk_token=None, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def prefix_lengths(tokenizer: Qwen2Tokenizer) -> dict[str, tuple[int, int]]:
    """For each template: (tokens before the prompt, tokens that the pipeline drops). They must be equal."""
    lengths = {}
    for name, (template, dropped) in prompt_templates().items():
        prefix = template.split("{}")[0]
        lengths[name] = (len(tokenizer(prefix)["input_ids"]), dropped)
    return lengths
