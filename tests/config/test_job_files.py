"""Job files of the automatic pre-caching workflow: every line of its specification is understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dittocache.config import RunConfig, load_config, save_config
from dittocache.errors import ConfigError

# The specification's own lines, with values other than the defaults, and what such files hold besides.
JOB = """
dataset_config = "{folder}/sets.toml"
vae = "{folder}/checkpoint/vae"
dit = "{folder}/checkpoint/transformer/diffusion_pytorch_model.safetensors"
text_encoder = "{folder}/checkpoint"
output_dir = "{folder}/out"
output_name = "my-lora"
caching_latent_device = "cuda"
caching_latent_batch_size = 2
caching_latent_num_workers = 3
caching_latent_skip_existing = false
caching_latent_keep_cache = false
caching_teo_device = "cuda:1"
caching_teo_fp8_vl = true
caching_teo_batch_size = 8
caching_teo_num_workers = 5
caching_teo_skip_existing = true
caching_teo_keep_cache = true
network_dim = 32
network_alpha = 16
learning_rate = 5e-5
max_train_steps = 1600
lr_scheduler = "constant"
optimizer_type = "AdamW8bit"
fp8_base = true
fp8_vl = true
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for component in ("vae", "transformer", "text_encoder"):
        (tmp_path / "checkpoint" / component).mkdir(parents=True)
    (tmp_path / "checkpoint" / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    return tmp_path


def read(folder: Path, text: str) -> RunConfig:
    path = folder / "job.toml"
    path.write_text(text.format(folder=folder))
    return load_config(path)


def test_every_line_of_a_job_file_means_what_the_specification_says(folder: Path) -> None:
    config = read(folder, JOB)
    assert config.model.path == str(folder / "checkpoint")
    assert config.run_dir == folder / "out" / "my-lora"
    assert config.data.path == folder / "sets.toml"
    cache = config.cache
    assert cache.devices == {"vae": "cuda", "text_encoder": "cuda:1"}
    assert (cache.batch_size_of("vae"), cache.batch_size_of("text_encoder")) == (2, 8)
    assert (cache.num_workers_of("vae"), cache.num_workers_of("text_encoder")) == (3, 5)
    assert (cache.skips_existing("vae"), cache.skips_existing("text_encoder")) == (False, True)
    assert (cache.keeps("vae"), cache.keeps("text_encoder")) == (False, True)
    assert cache.text_encoder_fp8
    train = config.train
    assert (train.rank, train.alpha, train.learning_rate, train.steps) == (32, 16, 5e-5, 1600)
    assert (train.lr_schedule, train.optimizer, train.base_quantization) == ("constant", "adamw8bit", "fp8")


def test_the_defaults_are_those_of_the_specification(folder: Path) -> None:
    """But for `fp8_vl`: by default, embeddings are those that pictures are made with, bit for bit."""
    cache = read(folder, 'dataset_config = "x.toml"\nvae = "{folder}/checkpoint/vae"\n').cache
    for encoder, batch_size in (("vae", 4), ("text_encoder", 16)):
        assert cache.batch_size_of(encoder) == batch_size
        assert cache.num_workers_of(encoder) == 8
        assert cache.skips_existing(encoder)
        assert cache.keeps(encoder)


def test_the_training_config_is_generated_without_them(folder: Path) -> None:
    save_config(read(folder, JOB), folder / "config.yaml")
    text = (folder / "config.yaml").read_text()
    assert "caching_" not in text and "dataset_config" not in text
    assert load_config(folder / "config.yaml") == read(folder, JOB)


def test_a_typo_is_told_with_the_nearest_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match="caching_latent_bach_size: .* did you mean caching_latent_batch_size"):
        read(folder, JOB + "caching_latent_bach_size = 2\n")


def test_toml_with_a_mistake_names_line_and_column(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"job.toml is not valid TOML: .*line 2, column"):
        read(folder, 'dataset_config = "x.toml"\nvae = /models/vae\n')


@pytest.mark.parametrize("name", ["vae", "dit", "text_encoder"])
def test_a_part_that_is_no_part_of_a_checkpoint_is_told_with_what_to_write(folder: Path, name: str) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("no weights here")
    for path in ("notes", "notes/single.safetensors"):
        with pytest.raises(ConfigError, match=f"{name}: found .*write model.path"):
            read(folder, f'dataset_config = "x.toml"\n{name} = "{folder}/{path}"\n')


def test_parts_of_two_checkpoints_are_refused(folder: Path) -> None:
    (folder / "other" / "vae").mkdir(parents=True)
    (folder / "other" / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="they mean the same: keep one"):
        read(folder, JOB.replace('vae = "{folder}/checkpoint/vae"', 'vae = "{folder}/other/vae"'))
