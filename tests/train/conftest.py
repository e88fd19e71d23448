import pytest
import tiny
from datasets import Dataset
from red_square import groups_of, scene
from trainings import FEATURES


@pytest.fixture
def base(processor, tmp_path):
    """A model folder and a folder of eight rows of ready-made groups."""
    tokenizer = processor.tokenizer
    model = tiny.backdrop_model(
        text_config=tiny.text_config(vocab_size=len(tokenizer)),
        image_token_id=processor.image_token_id,
        separator_token_ids=processor.separator_token_ids,
        num_prefusion_layers=1,
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [
        {
            "images": groups_of(processor.image_processor, scene(14 * (i % 4), 14)),
            "messages": [
                {"role": "user", "content": "what is shown?"},
                {"role": "assistant", "content": ["a red bus", "a bus"][i % 2]},
            ],
        }
        for i in range(8)
    ]
    Dataset.from_list(rows, features=FEATURES).save_to_disk(tmp_path / "rows")
    return tmp_path
