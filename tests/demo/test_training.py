"""The training code: shortcuts equal the stock computation; resuming, scheduling, optimising do what they say."""

import random

import pytest
import torch
from torch import nn

from dittocache.demo.edits import training_edits
from dittocache.demo.scenes import draw, random_scene
from dittocache.demo.train.configs import build_transformer, build_vae
from dittocache.demo.train.dit import draw_sigmas, split_parameters
from dittocache.demo.train.encode import sources_of
from dittocache.demo.train.fast import GRID, TrainingForward
from dittocache.demo.train.muon import Muon, orthogonalise
from dittocache.demo.train.plane import decode, encode_mean, from_plane, to_plane
from dittocache.demo.train.run import Budget, load_checkpoint, save_checkpoint, to_tensor


@pytest.mark.parametrize("zero_cond_t", [True, False])
def test_training_forward_equals_the_stock_transformer(zero_cond_t):
    torch.manual_seed(0)
    transformer = build_transformer(zero_cond_t)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.05)
    noisy, reference = torch.randn(2, 3, 64, 64)
    embeds, sigma = torch.randn(3, 22, 128), torch.tensor([0.1, 0.5, 0.9])
    mask = torch.ones(3, 22, dtype=torch.bool)
    mask[1, 19:] = False
    with torch.no_grad():
        stock = transformer(
            hidden_states=torch.cat([noisy, reference], dim=1),
            timestep=sigma,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[GRID, GRID]] * 3,
            return_dict=False,
        )[0][:, :64]
        ours = TrainingForward(transformer, 22, compiled=False)(
            noisy, reference, sigma, embeds, mask, torch.full((3,), zero_cond_t)
        )
        other = TrainingForward(transformer, 22, compiled=False)(
            noisy, reference, sigma, embeds, mask, torch.full((3,), not zero_cond_t)
        )
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    assert (other - stock).abs().max() > 1e-3


def test_an_untrained_transformer_predicts_zero():
    transformer = build_transformer()
    forward = TrainingForward(transformer, 22, compiled=False)
    mask = torch.ones(1, 22, dtype=torch.bool)
    velocity = forward(*torch.randn(2, 1, 64, 64), torch.ones(1), torch.randn(1, 22, 128), mask, mask[:, 0])
    assert (velocity == 0).all()


@torch.no_grad()
def test_plane_vae_equals_the_stock_vae_on_single_frames():
    torch.manual_seed(0)
    stock = build_vae()
    images = to_tensor([draw(random_scene(random.Random(seed))) for seed in range(2)])
    stock_latents = stock.encode(images.unsqueeze(2)).latent_dist.mode()
    stock_images = stock.decode(stock_latents).sample
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    plane = to_plane(stock)
    latents = encode_mean(plane, images)
    torch.testing.assert_close(latents, stock_latents[:, :, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode(plane, latents), stock_images[:, :, 0], atol=1e-4, rtol=1e-4)
    back = from_plane(plane)
    torch.testing.assert_close(back.encode(images.unsqueeze(2)).latent_dist.mode(), stock_latents, atol=1e-4, rtol=1e-4)
    assert back.state_dict().keys() == state.keys()


def test_orthogonalise_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 16, 64), (2, 64, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.max() < 1.35
        assert values.median() > 0.6


def test_muon_minimises_a_quadratic_and_resumes():
    torch.manual_seed(0)
    goal = torch.randn(8, 8)
    weight = nn.Parameter(torch.zeros(8, 8))
    muon = Muon([weight], weight_decay=0.0)
    for step in range(200):
        weight.grad = weight.detach() - goal
        muon.step(0.2 * (1 - step / 200))
    assert (weight - goal).abs().max() < 0.1
    other = Muon([weight])
    other.load_state_dict(muon.state_dict())
    assert torch.equal(other.state_dict()["8x8"], muon.state_dict()["8x8"])


def test_every_transformer_parameter_is_optimised_once():
    transformer = build_transformer()
    matrices, rest = split_parameters(transformer)
    ids = [id(p) for p in (*matrices, *rest)]
    assert len(ids) == len(set(ids)) == len(list(transformer.parameters()))


def test_the_rate_rises_holds_and_ends_at_zero():
    rates = [Budget(1.0, spent=60 * fraction).rate(warmup=0.1, hold=0.5) for fraction in (0.05, 0.3, 0.75, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=1e-2)


def test_noise_levels_lie_inside_and_lean_high():
    sigmas = draw_sigmas(2000, torch.Generator().manual_seed(0))
    assert sigmas.min() > 0
    assert sigmas.max() < 1
    assert sigmas[1::2].mean() > sigmas[::2].mean() + 0.15


def test_checkpoints_are_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "x.pt"
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.pt"]


def test_source_index_leads_back_to_each_source():
    edits = training_edits(40)
    scenes, index = sources_of(edits)
    assert len(scenes) < len(edits)
    assert [scenes[i] for i in index] == [edit.source for edit in edits]
