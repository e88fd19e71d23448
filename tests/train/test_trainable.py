"""What trains: what should move moves, what should not does not, and mistakes stop the run."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from trainings import trainer_for

from backdrop.train.trainable import select_trainable, trainable_summary, unused_parameters


@pytest.mark.parametrize(
    "patterns", [["multi_modal_projector", "prefusion", "embed_tokens"], ["language_model"], ["."]], ids=str
)
def test_one_step_moves_what_trains_and_nothing_else(base, patterns):
    trainer = trainer_for(base, trainable=patterns)
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trainable
    # Identity layers first move their zero output projections; what lies before those gets a zero gradient once.
    still = trainable - moved
    assert all(model.get_parameter(name).grad is not None or "prefusion" in name for name in still), still
    assert not trainable & unused_parameters(model)


def test_a_pattern_that_matches_nothing_is_named():
    model = tiny.backdrop_model()
    with pytest.raises(ValueError, match=r"trainable: \['multi_modal_projektor'\] matches no parameter"):
        select_trainable(model, ["language_model", "multi_modal_projektor"])
    select_trainable(model, ["multi_modal_projector"])
    rows = {row["module"]: row for row in trainable_summary(model)}
    assert rows["multi_modal_projector"]["share"] == 1 and rows["vision_tower"]["trainable"] == 0


def test_only_optional_parts_may_be_missing():
    import tiny

    model = tiny.backdrop_model()
    select_trainable(model, ["multi_modal_projector", "prefusion", "object_vision_tower"])
    with pytest.raises(ValueError, match="nothing would train"):
        select_trainable(tiny.backdrop_model(separators=False), ["prefusion", "separators"])


def test_a_tied_head_is_selected_by_either_name():
    """Found by the ladder's last stage: parameters are listed under their first name only."""
    for tied in (True, False):
        for pattern, names in (("lm_head", {"lm_head.weight"}), ("embed_tokens", {"embed_tokens"})):
            model = tiny.backdrop_model(text_config=tiny.text_config(tie_word_embeddings=tied))
            select_trainable(model, [pattern])
            trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
            both = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
            assert trained == (both if tied else {n for n in both if any(name in n for name in names)})


def test_separators_alone_train_their_rows_and_no_other(base):
    trainer = trainer_for(base, trainable=["separators"])
    trainer.args.weight_decay = 0.5
    table = trainer.model.get_input_embeddings().weight
    before = table.detach().clone()
    trainer.train()
    moved = (table.detach() != before).any(-1).nonzero().squeeze(-1).tolist()
    assert moved == sorted(trainer.model.config.separator_token_ids)
    row = next(row for row in trainable_summary(trainer.model) if row["module"] == "embed_tokens")
    assert row["trainable"] == 4 * table.shape[1]


def test_the_last_layers_train(base):
    trainer = trainer_for(base, trainable=["separators"], train_last_layers=1)
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names and all("layers.1." in name or "norm" in name or "embed" in name for name in names)
    assert any("layers.1.self_attn" in name for name in names)
    trainer.train()


def test_packed_numbers_are_counted_as_what_they_stand_for():
    model = tiny.backdrop_model()
    total = sum(row["parameters"] for row in trainable_summary(model))
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    packed = torch.nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=weight.shape)
    model.model.language_model.layers[0].mlp.up_proj.weight = packed
    assert sum(row["parameters"] for row in trainable_summary(model)) == total


def test_a_trainable_part_that_nothing_reads_stops_the_run(base):
    # Whole images have no object groups: the objects' projector gets no gradient.
    trainer = trainer_for(base, trainable=["multi_modal_projector"], separate_projectors=True)
    dataset = trainer.train_dataset

    def background_only(row):
        return {**row, "images": row["images"][:1]}

    trainer.train_dataset = [background_only(dataset[i]) for i in range(len(dataset))]
    with pytest.raises(ValueError, match="without a gradient after 2 steps: .*object_multi_modal_projector"):
        trainer.train()


def test_a_first_step_without_images_is_no_mistake(base):
    """LLaVA's mix has rows of text alone: a projector is looked at once there was an image."""

    def train(images):
        trainer = trainer_for(base, trainable=["multi_modal_projector", "language_model"])
        rows = [trainer.train_dataset[i] for i in range(8)]
        trainer.train_dataset = [
            row if i >= 4 and images else {**row, "images": []} for i, row in enumerate(rows)
        ]
        trainer.args.train_sampling_strategy = "sequential"
        trainer.args.max_steps = 3 if not images else 2
        trainer.train()

    train(images=True)
    with pytest.raises(ValueError, match="after 3 steps: model.multi_modal_projector"):
        train(images=False)


def test_gradients_that_an_engine_has_taken_away_count(base):
    """DeepSpeed steps and clears inside `backward`, before the optimizer's step is announced."""
    trainer = trainer_for(base, trainable=["multi_modal_projector"])
    trainer.create_optimizer()
    whole = trainer.training_step

    def stepping(model, inputs, *args, **kwargs):
        loss = whole(model, inputs, *args, **kwargs)
        model.zero_grad(set_to_none=True)
        return loss

    trainer.training_step = stepping
    trainer.train()


@pytest.mark.parametrize("change", ["one", "all_alike", "a_row"])
def test_a_frozen_parameter_that_moves_stops_the_run(base, change):
    trainer = trainer_for(base, trainable=["multi_modal_projector", "separators"])
    step_of = trainer.training_step
    norm = trainer.model.model.language_model.norm.weight
    table = trainer.model.get_input_embeddings().weight

    def meddling(*args, **kwargs):
        with torch.no_grad():
            if change == "one":
                norm[3].add_(1e-6)
            elif change == "all_alike":
                norm.mul_(1.01)  # an even number of equal elements: XOR alone would not see it
            else:
                table[5] += 1e-3
        return step_of(*args, **kwargs)

    trainer.training_step = meddling
    name = "embed_tokens" if change == "a_row" else "norm.weight"
    with pytest.raises(ValueError, match=rf"Frozen parameters moved in the first step: .*{name}"):
        trainer.train()
