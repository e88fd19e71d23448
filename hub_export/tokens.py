"""The placeholder and the separators: in the tokenizer, in the embedding table and in the model's configuration."""

import torch
from transformers import PreTrainedTokenizerBase

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import IMAGE_TOKEN, SEPARATOR_TOKENS, BackdropProcessor

# The words whose mean embedding a separator starts from.
SEPARATOR_WORDS = {
    "[BG_START]": "start of the background",
    "[BG_END]": "end of the background",
    "[OBJ_START]": "start of the objects",
    "[OBJ_END]": "end of the objects",
}


@torch.no_grad()
def prepare_tokens(
    model: BackdropForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    separators: bool = True,
    meaning: bool = True,
) -> None:
    """Adds the placeholder and the separators to the tokenizer, the embedding tables and the model's configuration.

    Embedding rows are added only where the table has none left, so that LLaVA-1.5 (32,064 embedding rows for 32,002
    tokens) stays bit for bit what it was. Separators start as the mean of the words that describe them (`SEPARATOR_WORDS`), or, with
    `meaning` False, at random with the table's own spread.
    """
    BackdropProcessor.add_tokens(tokenizer, separators)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = model.config
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.separator_token_ids = (
        tokenizer.convert_tokens_to_ids(list(SEPARATOR_TOKENS)) if separators else None
    )
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    if len(tokenizer) > rows and config.image_token_id >= rows:
        for table in tables.values():
            table[config.image_token_id] = 0
    for token, token_id in zip(SEPARATOR_TOKENS, config.separator_token_ids or (), strict=False):
        words = tokenizer(SEPARATOR_WORDS[token], add_special_tokens=False).input_ids
        for table in tables.values():
            start = (
                table[words].mean(0) if meaning else torch.randn_like(table[token_id]) * table[words].std()
            )
            table[token_id] = start
    config.check_fields()
