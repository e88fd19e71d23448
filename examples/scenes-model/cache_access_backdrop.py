"""The background cache of a model, and reuse from captured graphs: switched on and off, and asked for by the rest."""

import os

import torch
from transformers.utils import logging

from .background_cache_backdrop import BackgroundCache
from .background_folder_backdrop import BackgroundFolder
from .cache_options_backdrop import byte_count, flag
from .captured_reuse_backdrop import CapturedReuse
from .prefix_rules_backdrop import keeps_prefixes

logger = logging.get_logger(__name__)


class BackgroundCacheMixin:
    """For a `PreTrainedModel` whose base model (`base_model`) holds the cache."""

    _background_cache: BackgroundCache | None = None
    _compiled_reuse: CapturedReuse | None = None

    @property
    def background_cache(self) -> BackgroundCache | None:
        """The cache of backgrounds, None while it is off."""
        return self.base_model._background_cache

    @property
    def cache_in_use(self) -> BackgroundCache | None:
        """The cache for this call: None while it is off or bypassed, in training, and where gradients are taken.

        A compiled or exported forward pass has none either: what it computes may not depend on what is stored.
        """
        cache = self.background_cache
        if cache is None or torch.compiler.is_compiling():
            return None
        if cache.bypassed or self.training or torch.is_grad_enabled():
            return None
        return cache

    def _apply(self, fn, recurse: bool = True):
        # `to`, `half` and the like: what the cache remembers of the weights must not hold the memory that they leave.
        if self._background_cache is not None:
            self._background_cache.forget_weights()
        return super()._apply(fn, recurse)

    def enable_background_cache(
        self,
        max_bytes: int | str = 2 * 2**30,
        prefixes: bool = True,
        host_max_bytes: int | str = 0,
        folder: str | os.PathLike | None = None,
        folder_max_bytes: int | str = 16 * 2**30,
    ) -> BackgroundCache:
        """Keeps vision tokens and language-model prefixes of backgrounds and reuses them; answers do not change.

        Args:
            max_bytes: bound on everything kept where the model is, as a number or as text such as "2GB" or "512MiB", like
                the other bounds; the least recently used is evicted first.
            prefixes: keep keys and values of the language model too, not vision tokens alone.
            host_max_bytes: bound on what is kept in the host's memory after eviction; useful beside a GPU.
            folder: a folder for what is to outlive this process; several processes may share it.
            folder_max_bytes: bound on its bytes.

        Returns:
            The new, empty cache; an earlier one is dropped.

        Raises:
            ValueError: an option is of the wrong type, a bound is too small, or `folder` is a file.
        """
        text_config = self.config.text_config
        prefixes_work = keeps_prefixes(text_config)
        if flag("prefixes", prefixes) and not prefixes_work:
            logger.warning(
                f"{text_config.model_type} is no full-attention decoder: the background cache keeps vision "
                "tokens only."
            )
        # Checked before a folder is made.
        folder_max_bytes = byte_count("folder_max_bytes", folder_max_bytes, 1)
        cache = BackgroundCache(max_bytes, prefixes and prefixes_work, host_max_bytes)
        if folder is not None:
            cache.folder = BackgroundFolder(folder, folder_max_bytes)
        self.base_model._background_cache = cache
        return self.background_cache

    def disable_background_cache(self) -> None:
        """Drops the cache; everything is computed again."""
        self.base_model._background_cache = None

    @property
    def compiled_reuse(self) -> CapturedReuse | None:
        """What runs reused answers from captured graphs, None while it is off."""
        return self.base_model._compiled_reuse

    def compile_reuse(
        self,
        bucket: int = 32,
        max_bytes: int | str = 2 * 2**30,
        max_graphs: int = 32,
        max_batch: int = 1,
        capture: bool = True,
    ) -> CapturedReuse:
        """Runs the layers of reused answers from captured CUDA graphs; for the background cache, which must be on.

        Each new size of prompt or object group costs a warm-up at its first call (three passes as without graphs).
        Answers are those of the plain path, up to rounding. What does not fit takes the plain path: see
        `compiled_reuse.stats()`.

        Args:
            bucket: new tokens, and tokens of a group, are padded to multiples of it.
            max_bytes: bound on the static buffers of keys and values.
            max_graphs: bound on the graphs; the least recently used is dropped.
            max_batch: the most rows of a batch, and groups of a call, that run so.
            capture: False: the same padded passes without graphs, on any device, to compare with.

        Returns:
            The new object; an earlier one and its graphs are dropped.

        Raises:
            ValueError: an option is of the wrong type, or less than 1.
        """
        self.disable_compiled_reuse()
        self.base_model._compiled_reuse = CapturedReuse(bucket, max_bytes, max_graphs, max_batch, capture)
        return self.compiled_reuse

    def disable_compiled_reuse(self) -> None:
        """Drops every captured graph; reused answers are launched by Python again."""
        if self.compiled_reuse is not None:
            self.compiled_reuse.clear()
        self.base_model._compiled_reuse = None
