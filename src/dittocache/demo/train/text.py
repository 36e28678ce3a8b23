"""Stage `text`: pre-train the text encoder to restate the instruction and describe the picture, then freeze it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from dittocache.demo.edits import NEW_KIND, Edit, new_edit, training_edits
from dittocache.demo.scenes import COLOURS, SHAPES, TEXTURES, draw
from dittocache.demo.train.assemble import save_frame, save_module
from dittocache.demo.train.configs import build_image_processor, build_text_encoder
from dittocache.demo.train.muon import Muon
from dittocache.demo.train.run import Budget, Log, load_checkpoint, save_checkpoint
from dittocache.demo.train.tokenizer import prompt_templates
from dittocache.families.qwen_processor import StillImageProcessor

BATCH = 32
CONDITION_SIDE = 64  # pixels; the pipelines shrink the picture to this for the text encoder
MUON_RATE, ADAM_RATE = 3e-3, 3e-3
IMAGE_PROMPT = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"  # as the stock Edit-Plus writes it
KIND_WORDS = {
    "recolour": "paint",
    "remove": "remove",
    "border": "border",
    "background": "background",
    "grayscale": "gray",
    "add": "add",
    "stars": "stars",
    "texture": "texture",
    NEW_KIND: "blueprint",
}


def words_of(instruction: str, vocabulary: tuple[str, ...]) -> list[str]:
    """The words of an instruction that belong to a vocabulary, in order."""
    return [word for word in re.findall(r"[a-z]+", instruction) if word in vocabulary]


def answer(edit: Edit) -> str:
    """What the language model must say: the edit in a fixed form, then the source picture."""
    content = words_of(edit.instruction, (*COLOURS, *SHAPES, *TEXTURES))
    order = {word: rank for rank, word in enumerate((*TEXTURES, *SHAPES, *COLOURS))}
    parts = [KIND_WORDS[edit.kind], *sorted(content, key=order.__getitem__), "with a", edit.source.ground, "ground"]
    for shape in sorted(edit.source.shapes, key=lambda s: s.kind):
        parts += ["and a", shape.colour, shape.kind]
    return " " + " ".join(parts)


def train_text(work_dir: Path, model_dir: Path, minutes: float, device: str = "cpu") -> None:
    """Train for `minutes`, probe, and save to `model_dir/text_encoder`. Resumes from its checkpoint."""
    torch.manual_seed(0)
    log = Log(work_dir / "log.jsonl", "text")
    tokenizer = Qwen2Tokenizer.from_pretrained(work_dir / "tokenizer")
    processor = StillImageProcessor(build_image_processor(), tokenizer)
    encoder = build_text_encoder(tokenizer).to(device).train()
    matrices = [p for n, p in encoder.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in encoder.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    step, spent = 0, 0.0
    checkpoint = load_checkpoint(work_dir / "text.pt")
    if checkpoint is not None:
        encoder.load_state_dict(checkpoint["model"])
        muon.load_state_dict(checkpoint["muon"])
        adam.load_state_dict(checkpoint["adam"])
        step, spent = checkpoint["step"], checkpoint["spent"]
    budget = Budget(minutes, spent)
    rng = random.Random(step)

    def save() -> None:
        state = {"model": encoder.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
        save_checkpoint(work_dir / "text.pt", state | {"step": step, "spent": budget.spent})

    while budget.fraction < 1.0:
        edits = training_edits(BATCH, seed=rng.randrange(2**31), edits_per_scene=1)
        edits[0] = new_edit(edits[0].source) if step % 2 else edits[0]
        loss, accuracy = answer_loss(encoder, processor, edits, device)
        loss.backward()  # type: ignore[no-untyped-call]
        rate = budget.rate()
        nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(MUON_RATE * rate)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        adam.step()
        encoder.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            log.write(step=step, loss=round(float(loss.detach()), 4), accuracy=round(accuracy, 4), rate=round(rate, 3))
        if step % 100 == 0:
            save()
    save()
    save_frame(model_dir, tokenizer)
    save_module(encoder, model_dir / "text_encoder")
    log.write(step=step, **probe(encoder.eval(), processor, device))


def answer_loss(
    encoder: Qwen2_5_VLForConditionalGeneration, processor: StillImageProcessor, edits: list[Edit], device: str
) -> tuple[torch.Tensor, float]:
    """Cross-entropy and accuracy over the answers' tokens only, the prompts as the stock pipeline writes them."""
    template, _ = prompt_templates()["edit_plus"]
    prompts = [template.format(IMAGE_PROMPT + edit.instruction) for edit in edits]
    texts = [prompt + answer(edit) + "<|im_end|>" for prompt, edit in zip(prompts, edits, strict=True)]
    images = [draw(edit.source).resize((CONDITION_SIDE, CONDITION_SIDE)) for edit in edits]
    inputs = processor(text=texts, images=images, padding=True).to(device)
    logits = encoder(**inputs).logits[:, :-1]  # (B, T - 1, vocabulary)
    targets = inputs["input_ids"][:, 1:].clone()
    answer_starts = processor(text=prompts, images=images, padding=True)["attention_mask"].sum(dim=1)
    position = torch.arange(targets.shape[1])
    outside = (position < answer_starts[:, None] - 1) | (inputs["attention_mask"][:, 1:].cpu() == 0)
    targets[outside.to(device)] = -100
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    kept = targets != -100
    return loss, float((logits.argmax(dim=-1) == targets)[kept].float().mean())


@torch.no_grad()
def probe(encoder: Qwen2_5_VLForConditionalGeneration, processor: StillImageProcessor, device: str) -> dict[str, float]:
    """Accuracy of linear probes for colour and shape words on mean-pooled last hidden states.

    Ridge regression to one-hot words on 640 recolour prompts, tested on 320 others of other scenes.
    """
    template, dropped = prompt_templates()["edit_plus"]
    edits = [e for e in training_edits(6000, seed=777, edits_per_scene=1) if e.kind == "recolour"][:960]
    states = []
    for start in range(0, len(edits), 32):
        part = edits[start : start + 32]
        texts = [template.format(IMAGE_PROMPT + edit.instruction) for edit in part]
        images = [draw(edit.source).resize((CONDITION_SIDE, CONDITION_SIDE)) for edit in part]
        inputs = processor(text=texts, images=images, padding=True).to(device)
        hidden = encoder(**inputs, output_hidden_states=True).hidden_states[-1][:, dropped:]
        mask = inputs["attention_mask"][:, dropped:, None]
        states.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1)).float().cpu())
    features = torch.cat(states)
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()  # (960, 129)
    accuracies = {}
    for name, vocabulary in (("colour", tuple(COLOURS)), ("shape", SHAPES)):
        labels = torch.tensor([vocabulary.index(words_of(e.instruction, vocabulary)[0]) for e in edits])
        onehot = F.one_hot(labels, len(vocabulary)).double()
        train, test = features[:640], features[640:]
        gram = train.T @ train + 1e-3 * torch.eye(train.shape[1]).double()
        weights = torch.linalg.solve(gram, train.T @ onehot[:640])
        accuracies[f"probe_{name}"] = float(((test @ weights).argmax(dim=1) == labels[640:]).float().mean())
    return accuracies
