"""What the background cache sees of a model beside its tensors: each line of the table in docs/guides/cache.md.

A change that is seen makes another key. Where foreign code runs, nothing that it concerns is kept, and a line says so.
"""

import contextlib
import functools
import gc
import logging
import types

import numpy as np
import pytest
import tiny
import torch
from model_inputs import batch, generate, inputs_of
from torch import nn
from transformers.utils import logging as transformers_logging

from backdrop.modeling.background_folder_backdrop import BackgroundFolder


class Scaled(nn.Module):
    """A hand-written low-rank adapter around a linear layer."""

    def __init__(self, base: nn.Linear, **attributes):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, hidden):
        scale = self.scale
        scale = scale["alpha"] if isinstance(scale, dict) else scale
        scale = scale[0] if isinstance(scale, list) else scale
        scale = scale.alpha if isinstance(scale, Strength | Slotted) else scale
        scale = float(scale) if isinstance(scale, np.ndarray) else scale
        return self.base(hidden) + self.up(self.down(hidden)) * scale


class Strength:
    def __init__(self, alpha):
        self.alpha = alpha


class Slotted:
    __slots__ = ("alpha",)

    def __init__(self, alpha):
        self.alpha = alpha


def adapted(model, scale):
    torch.manual_seed(9)
    mlp = model.model.language_model.layers[0].mlp
    mlp.up_proj = Scaled(mlp.up_proj, scale=scale)
    return mlp.up_proj


# ---- changes that are seen: what prepares the model, and what changes it


def nothing(model):
    pass


def norm_eps(model):
    model.model.language_model.layers[0].input_layernorm.variance_epsilon = 0.5


def tower_norm_eps(model):
    model.model.vision_tower.encoder.layers[0].layer_norm1.eps = 0.5


def attention_scaling(model):
    model.model.language_model.layers[1].self_attn.scaling *= 3


def rotary_scaling(model):
    model.model.language_model.rotary_emb.attention_scaling = 2.0


def activation_swapped(model):
    model.model.language_model.layers[0].mlp.act_fn = nn.ReLU()


def activation_attribute(model):
    model.model.language_model.layers[0].mlp.act_fn.negative_slope = 5.0


def projector_activation(model):
    model.model.multi_modal_projector.act = nn.Tanh()


def layer_config(model):
    model.model.language_model.config.rope_parameters["custom"] = 3


def number_of_heads(model):
    model.model.vision_tower.encoder.layers[0].self_attn.num_heads = 2
    model.model.vision_tower.encoder.layers[0].self_attn.head_dim = 16


def scale_in_a_list(model):
    model.model.language_model.layers[0].mlp.up_proj.scale[0] = 3.0


def scale_in_a_dict(model):
    model.model.language_model.layers[0].mlp.up_proj.scale["alpha"] = 3.0


def scale_in_an_object(model):
    model.model.language_model.layers[0].mlp.up_proj.scale.alpha = 3.0


def scale_in_an_array(model):
    model.model.language_model.layers[0].mlp.up_proj.scale[...] = 3.0


def scale_in_a_tensor(model):
    model.model.language_model.layers[0].mlp.up_proj.scale.mul_(3)


def scale_assigned(model):
    model.model.language_model.layers[0].mlp.up_proj.scale = 3.0


SEEN = {
    "a norm's eps": (nothing, norm_eps),
    "a norm's eps in the tower": (nothing, tower_norm_eps),
    "an attention's scaling": (nothing, attention_scaling),
    "the rotary embedding's scaling": (nothing, rotary_scaling),
    "an activation swapped": (nothing, activation_swapped),
    "an attribute of an activation": (
        lambda model: setattr(model.model.language_model.layers[0].mlp, "act_fn", nn.LeakyReLU()),
        activation_attribute,
    ),
    "the projector's activation": (nothing, projector_activation),
    "a dictionary in a configuration": (nothing, layer_config),
    "an attention's number of heads": (nothing, number_of_heads),
    "an adapter's scale": (lambda model: adapted(model, 1.0), scale_assigned),
    "an adapter's scale in a list": (lambda model: adapted(model, [1.0]), scale_in_a_list),
    "an adapter's scale in a dictionary": (lambda model: adapted(model, {"alpha": 1.0}), scale_in_a_dict),
    "an adapter's scale in an object": (lambda model: adapted(model, Strength(1.0)), scale_in_an_object),
    "an adapter's scale in slots": (lambda model: adapted(model, Slotted(1.0)), scale_in_an_object),
    "an adapter's scale in an array": (lambda model: adapted(model, np.ones(())), scale_in_an_array),
    "an adapter's scale in a tensor": (lambda model: adapted(model, torch.ones(())), scale_in_a_tensor),
}


def hits(model):
    stats = model.background_cache.stats()
    return stats["tokens_hits"], stats["prefix_hits"]


def uncached(model, inputs):
    with model.background_cache.scope(bypass=True):
        return generate(model, inputs)


def first_logits(model, inputs):
    return model(**model.prepare_prefill(**inputs)).logits[:, -1]


@pytest.mark.parametrize("prepare, change", SEEN.values(), ids=SEEN)
def test_a_change_is_seen_and_its_undoing_too(prepare, change):
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    prepare(model)
    model.enable_background_cache(10**7)
    generate(model, inputs)
    generate(model, inputs)
    before = hits(model)
    assert all(before)
    change(model)
    assert torch.equal(generate(model, inputs), uncached(model, inputs))
    kept, dropped = hits(model), [now == then for now, then in zip(hits(model), before, strict=True)]
    assert any(dropped), kept
    model.background_cache.forget_weights()
    generate(model, inputs)
    assert hits(model) > kept  # the state has one key, whether compared or taken anew


@pytest.mark.parametrize("prepare, change", SEEN.values(), ids=SEEN)
def test_a_change_is_seen_by_another_process_with_the_folder(prepare, change, tmp_path, monkeypatch):
    """Two models, one folder: the second has the change from its start and reads nothing of the first's."""
    monkeypatch.setattr(BackgroundFolder, "seconds_to_load", lambda self, num_bytes: 0.0)
    inputs = batch(tiny.backdrop_model())
    for changes in ((), (), (change,)):
        model = tiny.backdrop_model()
        prepare(model)
        for apply in changes:
            apply(model)
        model.enable_background_cache(10**7, folder=tmp_path)
        assert torch.equal(generate(model, inputs), uncached(model, inputs))
        model.background_cache.folder.flush(30)
        if not changes:
            known = model.background_cache.stats()
    assert known["disk_hits"] >= 2  # the second of the two equal models had both kinds from the folder
    stats = model.background_cache.stats()
    assert not (stats["tokens_hits"] and stats["prefix_hits"])


# ---- foreign code: what it concerns is not kept


def doubled(module, args, output):
    return output * 2


class Steering:
    """A hook whose strength changes."""

    def __init__(self):
        self.strength = 1.0

    def __call__(self, module, args, output):
        return output * self.strength


def part_of(model, where):
    return {
        "tower": model.model.vision_tower.encoder.layers[0].mlp,
        "projector": model.model.multi_modal_projector.linear_2,
        "language model": model.model.language_model.layers[0].mlp,
    }[where]


def replace_forward(part):
    own = type(part).forward
    part.forward = lambda *args: own(part, *args) * 2


def bind_forward(part):
    own = type(part).forward
    part.forward = types.MethodType(lambda self, *args: own(self, *args) * 2, part)


def wrap_forward(part):
    own = part.forward
    part.forward = functools.wraps(own)(lambda *args: own(*args) * 2)


def without_gradients(part):
    part.register_forward_hook(torch.no_grad()(doubled))


FOREIGN = {
    "hook": lambda part: part.register_forward_hook(doubled),
    "hook object": lambda part: part.register_forward_hook(Steering()),
    "bound hook": lambda part: part.register_forward_hook(Steering().__call__),
    "partial hook": lambda part: part.register_forward_hook(functools.partial(doubled)),
    "wrapped hook": without_gradients,
    "pre-hook": lambda part: part.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:])),
    "forward": replace_forward,
    "bound forward": bind_forward,
    "forward that looks like the old": wrap_forward,
}


@pytest.mark.parametrize(
    "change, where",
    [
        *((change, "language model") for change in FOREIGN.values()),
        *((FOREIGN[name], where) for name in ("hook", "forward") for where in ("tower", "projector")),
    ],
)
def test_what_foreign_code_concerns_is_not_kept(change, where, tmp_path):
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    model.enable_background_cache(10**7, folder=tmp_path)
    generate(model, inputs)
    change(part_of(model, where))
    stored, known = model.background_cache.stats(), hits(model)
    with logged() as lines:
        for _ in range(2):
            assert torch.equal(generate(model, inputs), uncached(model, inputs))
    stats = model.background_cache.stats()
    assert stats["prefix_hits"] == known[1] and stats["prefix_misses"] == stored["prefix_misses"]
    if where == "language model":
        assert stats["tokens_hits"] > known[0]  # what foreign code does there does not concern the tower
    else:
        assert stats["tokens_hits"] == known[0] and stats["entries"] == stored["entries"]
    name = {"tower": "encoder.layers.0.mlp", "projector": "linear_2", "language model": "layers.0.mlp"}[where]
    assert len(lines) == 1 and name in lines[0] and "test_seen_changes" in lines[0]


@contextlib.contextmanager
def logged():
    """The lines about what the cache cannot tell; each of them is logged once in a process."""
    transformers_logging.warning_once.cache_clear()
    lines, logger = [], logging.getLogger("backdrop.modeling.background_cache_backdrop")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def test_a_steering_vector_whose_strength_changes_never_meets_an_old_value():
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    steering = Steering()
    model.model.language_model.layers[0].register_forward_hook(steering)
    model.enable_background_cache(10**7)
    for steering.strength in (1.0, 5.0, -2.0):
        expected = uncached(model, inputs)
        assert torch.equal(generate(model, inputs), expected)


def test_forwards_that_take_each_others_place_are_told_apart():
    """CPython gives a new object the address of one that is gone."""
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    model.enable_background_cache(10**7)
    mlp = model.model.language_model.layers[0].mlp
    for factor in (2.0, -3.0, 5.0, 0.0):
        mlp.forward = (lambda own, by: lambda x: own(mlp, x) * by)(type(mlp).forward, factor)
        with torch.no_grad():
            found = first_logits(model, inputs)
            with model.background_cache.scope(bypass=True):
                assert torch.allclose(found, first_logits(model, inputs), atol=1e-5)
        del mlp.forward
        gc.collect()


def test_a_forward_replaced_in_the_class_is_not_kept(monkeypatch, tmp_path):
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    model.enable_background_cache(10**7, folder=tmp_path)
    generate(model, inputs)
    before = hits(model)
    cls = type(model.model.language_model.layers[0].mlp)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", functools.wraps(own)(lambda self, x: own(self, x) * 2))
    assert torch.equal(generate(model, inputs), uncached(model, inputs))
    assert hits(model)[1] == before[1]


def test_global_hooks_keep_everything_out():
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    model.enable_background_cache(10**7)
    generate(model, inputs)
    before = model.background_cache.stats()

    def hook(module, args, output):
        return output * 1.5 if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert torch.equal(generate(model, inputs), uncached(model, inputs))
    finally:
        handle.remove()
    after = model.background_cache.stats()
    assert (after["tokens_hits"], after["prefix_hits"]) == (before["tokens_hits"], before["prefix_hits"])
    generate(model, inputs)
    assert hits(model) > (before["tokens_hits"], before["prefix_hits"])


def test_an_attention_function_registered_anew_is_another_attention():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention_that(factor):
        def attention(module, query, *args, **kwargs):
            output, weights = sdpa_attention_forward(module, query, *args, **kwargs)
            return output * factor, weights

        return attention

    model, inputs = tiny.backdrop_model(), inputs_of([[0, 1]])
    model.enable_background_cache(10**7)
    for factor in (1.0, 3.0):
        AttentionInterface.register("of_this_test", attention_that(factor))
        model.model.language_model.config._attn_implementation = "of_this_test"
        AttentionMaskInterface.register("of_this_test", sdpa_mask)
        with torch.no_grad():
            found = first_logits(model, inputs)
            with model.background_cache.scope(bypass=True):
                assert torch.allclose(found, first_logits(model, inputs), atol=1e-5)


# ---- code of the libraries goes on working with the cache


def capture_outputs(model, inputs):
    model(**inputs, output_hidden_states=True)  # installs transformers' own hooks, for good
    assert model.model.language_model.layers[0]._forward_hooks


def accelerate_hooks(model, inputs):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in (model.model.language_model.layers[0].mlp, model.model.vision_tower):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def accelerate_dispatch(model, inputs):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model.model.language_model, execution_device="cpu")


def rebound_forward(model, inputs):
    layer = model.model.language_model.layers[0]
    layer.forward = layer.forward


def peft_input_gradients(model, inputs):
    model.enable_input_require_grads()


def weight_norm(model, inputs):
    nn.utils.parametrizations.weight_norm(model.model.language_model.layers[0].mlp.up_proj)


LIBRARIES = [
    capture_outputs,
    accelerate_hooks,
    accelerate_dispatch,
    rebound_forward,
    peft_input_gradients,
    weight_norm,
]


@pytest.mark.parametrize("prepare", LIBRARIES)
def test_hooks_of_the_libraries_go_on_working(prepare):
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    with torch.no_grad():
        prepare(model, inputs)
    model.enable_background_cache(10**7)
    expected = uncached(model, inputs)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    assert all(hits(model))


def test_compiled_modules_go_on_working():
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    model.model.language_model.layers[0].mlp = torch.compile(
        model.model.language_model.layers[0].mlp, backend="eager"
    )
    model.model.language_model.norm.compile(backend="eager")
    model.enable_background_cache(10**7)
    expected = uncached(model, inputs)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    assert all(hits(model))


def test_a_steering_hook_of_accelerates_kind_is_foreign():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Steer(ModelHook):
        def post_forward(self, module, output):
            return output * 3

    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    model.enable_background_cache(10**7)
    add_hook_to_module(model.model.language_model.layers[0].mlp, Steer())
    for _ in range(2):
        assert torch.equal(generate(model, inputs), uncached(model, inputs))
    assert not hits(model)[1]


def test_a_state_written_in_c_is_named():
    model, inputs = tiny.backdrop_model(), batch(tiny.backdrop_model())
    model.model.language_model.norm.counter = iter([1])
    model.enable_background_cache(10**7)
    generate(model, inputs)
    generate(model, inputs)
    assert hits(model)[0] and not hits(model)[1]
