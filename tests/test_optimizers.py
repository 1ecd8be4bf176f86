import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW

from models import Policy
from optimizers import MUON_FACTOR, Muon, Together, make_optimizer, make_scheduler, orthogonalize, take_step


def names_of(groups, module):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


@pytest.mark.parametrize(
    ("architecture", "inside"),
    [
        ("qwen2", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_muon_takes_exactly_the_matrices_inside_the_layers(random_model, architecture, inside):
    policy = Policy(random_model(architecture))
    muon, adamw = make_optimizer(policy, "muon", 1e-3, 0.1).parts
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    with_muon = names_of(muon.param_groups, policy)
    assert len(with_muon) == 2 * len(inside)
    for layer in "01":
        for part in inside:
            assert sum(f".{layer}." in name and name.endswith(f"{part}.weight") for name in with_muon) == 1
    everything = with_muon + names_of(adamw.param_groups, policy)
    assert sorted(everything) == sorted(name for name, _ in policy.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay_and_frozen_parameters_stay_out(tiny, name):
    policy = Policy(copy.deepcopy(tiny[0]))
    frozen = policy.model.model.layers[0].requires_grad_(False)
    optimizer = make_optimizer(policy, name, 1e-3, 0.1)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    assert trained.isdisjoint(id(parameter) for parameter in frozen.parameters())
    for group in optimizer.param_groups:
        assert group["lr"] in (1e-3, MUON_FACTOR * 1e-3)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_a_critic_has_a_learning_rate_of_its_own(tiny, name, kind):
    policy = Policy(copy.deepcopy(tiny[0]), kind)
    optimizer = make_optimizer(policy, name, 1e-3, 0.1, critic_learning_rate=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(policy.parameters()))
    for parameter_name, parameter in policy.named_parameters():
        assert (rates[id(parameter)] == 0.5) == parameter_name.startswith("critic.")
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in policy.critic.named_parameters():
        is_matrix_inside = parameter.ndim >= 2 and parameter_name.startswith("trunk.")
        assert decays[id(parameter)] == (0.1 if is_matrix_inside else 0.0)


class Toy(nn.Module):
    """Has what an optimizer tells apart: a table, a matrix inside, a bias, a norm, a head."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(5, 4)
            self.inside = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)
            self.lm_head = nn.Linear(4, 5, bias=False)

    def forward(self, ids):
        return self.lm_head(self.norm(self.inside(self.table(ids))))


def train(model, optimizer, scheduler, steps):
    for step in steps:
        ids = torch.tensor([step % 5, (step + 2) % 5])
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def build(name):
    model = Toy()
    optimizer = make_optimizer(model, name, 0.02, 0.1)
    return model, optimizer, make_scheduler(optimizer, "cosine", 2, 8)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_continues_bit_for_bit(name, tmp_path):
    whole = build(name)
    train(*whole, range(6))
    first, second = build(name), build(name)
    train(*first, range(3))
    torch.save([part.state_dict() for part in first], tmp_path / "state")
    for part, state in zip(second, torch.load(tmp_path / "state"), strict=True):
        part.load_state_dict(state)
    train(*second, range(3, 6))
    untrained = Toy().state_dict()
    for key, weight in whole[0].state_dict().items():
        assert torch.equal(weight, second[0].state_dict()[key])
        assert not torch.equal(weight, untrained[key])
    assert whole[2].get_last_lr() == second[2].get_last_lr()


def test_a_learning_rate_set_on_the_whole_is_the_parts_also_after_loading():
    model = Toy()
    optimizer = make_optimizer(model, "muon", 0.4, 0.0)
    scheduler = make_scheduler(optimizer, "linear", 0, 4)

    def rates():
        return {round(group["lr"], 12) for part in optimizer.parts for group in part.param_groups}

    train(model, optimizer, scheduler, [0])
    assert rates() == {0.3, round(MUON_FACTOR * 0.3, 12)}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, scheduler, [1])
    assert rates() == {0.2, round(MUON_FACTOR * 0.2, 12)}
    train(model, optimizer, scheduler, [2, 3])
    assert rates() == {0.0}
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, scheduler, [4])
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, before[key])


def test_zero_grad_on_the_whole_reaches_every_part():
    model = Toy()
    optimizer = make_optimizer(model, "muon", 0.1, 0.0)
    assert isinstance(optimizer, Together)
    model(torch.tensor([0, 1])).sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "warmup", "total", "expected"),
    [
        ("constant", 0, 4, [1, 1, 1, 1, 1]),
        ("constant", 3, 4, [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        ("linear", 0, 4, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("linear", 2, 6, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("cosine", 0, 4, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2, 0, 0]),
        ("cosine", 1, 3, [1 / 2, 1, 1 / 2, 0, 0]),
        # a run that is over before it is warm
        ("linear", 4, 2, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 0]),
    ],
)
def test_scheduler_values(name, warmup, total, expected):
    optimizer = AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = make_scheduler(optimizer, name, warmup, total)
    seen = []
    for _ in expected:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.1 * factor for factor in expected], abs=1e-12)


def test_muon_moves_weights_as_the_one_of_torch_does():
    shapes = [(6, 6), (6, 6), (4, 6), (16, 6), (6, 16), (16, 6)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    theirs = copy.deepcopy(ours)
    start = [matrix.detach().clone() for matrix in ours]
    optimizers = (
        Muon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="original"),
    )
    for step in gradients:
        for matrices, optimizer in zip((ours, theirs), optimizers, strict=True):
            for matrix, gradient in zip(matrices, step, strict=True):
                matrix.grad = gradient.clone()
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        # Theirs rounds to bfloat16, three digits.
        assert (mine - other).norm() < 0.02 * (other - before).norm()


def test_orthogonalize_keeps_the_singular_vectors_and_evens_the_values():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        matrices = torch.randn(3, 8, 20)
    moved = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ moved @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("loss", "gradient", "of_others", "steps"),
    [
        (1.0, 1.0, [None], True),
        (math.nan, 1.0, [], False),
        (math.inf, 1.0, [], False),
        (1.0, math.nan, [], False),
        (1.0, math.inf, [], False),
        (1.0, 1.0, ["loss nan, gradient norm 1"], False),
    ],
)
def test_weights_move_only_where_every_process_is_finite(monkeypatch, loss, gradient, of_others, steps):
    monkeypatch.setattr("optimizers.gather_object", lambda told: [*told, *of_others])
    layer = nn.Linear(2, 2)
    optimizer = AdamW(layer.parameters(), lr=0.1)
    scheduler = make_scheduler(optimizer, "linear", 0, 10)
    before = copy.deepcopy(layer.state_dict())
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    _, cause = take_step(Accelerator(), layer, optimizer, scheduler, loss, 1.0)
    assert (cause is None) == steps
    assert all(torch.equal(weight, before[name]) for name, weight in layer.state_dict().items()) != steps
    assert all(p.grad is None for p in layer.parameters())
    assert scheduler.get_last_lr() == [pytest.approx(0.09)]
    assert not any(torch.isnan(v).any() for state in optimizer.state.values() for v in state.values())


@pytest.fixture
def in_float16():
    """Accelerate as on a GPU without bfloat16, with a scaler that runs on a processor."""
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    yield accelerator
    accelerator.state._mixed_precision = "no"


def take_steps(accelerator, slopes, max_grad_norm=1.0):
    """Of a layer, under losses of these slopes: its weight after each, and what each step told."""
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    policy, optimizer = accelerator.prepare(layer, AdamW(layer.parameters(), lr=0.1))
    scheduler = make_scheduler(optimizer.optimizer, "constant", 0, 10)
    moved, told = [], []
    for slope in slopes:
        accelerator.backward(slope * layer(torch.tensor([[3.0, 4.0]])).sum())
        told.append(take_step(accelerator, policy, optimizer, scheduler, 1.0, max_grad_norm))
        moved.append(layer.weight.detach().clone())
    return moved, told


def test_a_scaled_loss_moves_weights_as_one_that_is_not(in_float16):
    slopes = [1.0, -2.0, 0.5, 0.125]  # which half precision holds
    scaled, told = take_steps(in_float16, slopes)
    assert in_float16.scaler.get_scale() == 16  # three in a row without overflow
    in_float16.scaler = None
    in_float16.native_amp = False
    plain, without = take_steps(in_float16, slopes)
    for ours, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert [norm for norm, _ in told] == pytest.approx(
        [5, 10, 2.5, 0.625], rel=1e-6
    )  # of gradients as they are
    assert told == [(pytest.approx(norm, rel=1e-6), None) for norm, _ in without]


def test_an_overflow_leaves_the_step_out_and_scales_less_until_less_is_nothing(in_float16):
    moved, told = take_steps(in_float16, [1.0, math.inf, 1.0, *[math.inf] * 4, 1.0])
    assert torch.equal(moved[1], moved[0])
    assert not torch.equal(moved[2], moved[1])  # it goes on
    causes = [cause for _, cause in told]
    # At scales 8, 4, 2 and 1 an overflow is no news; from there on it is a run that diverges.
    assert [cause is None for cause in causes] == [True, True, True, True, True, True, False, True]
    assert "gradient norm" in causes[6]
    assert all(torch.isfinite(weight).all() for weight in moved)
    assert in_float16.scaler.get_scale() == 0.25
