"""How a background improves: what its patches show of late, and when it pays to make one of its layers anew.

A reference begins as one frame, with that frame's noise, and without the patches where an object stood. Each frame that
matches it updates a running mean of every patch; where a patch changed, its mean starts again. So the tracker knows what a new
layer would show, which patches would be worth owning, and what the layers there are cost: patches that are encoded
freshly although they have settled, and stale tokens that the prompt holds for patches which no longer show them.

A layer is made anew once what it cost adds up to its own encoding. This is the break-even rule of the ski-rental
problem, which never costs more than twice the optimum (Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988).
The second layer is small and is made anew often. The first is made anew where it holds stale tokens for
patches that never rest, which it then disowns, or where the second one encodes time after time what has stayed long.

A parked object is still an object, so the patches of detected objects never settle; without this the running mean would
absorb it, and a model trained on backgrounds without objects answers worse about what hides in one.
"""

import copy
from dataclasses import dataclass

import numpy as np

from .background_layers_backdrop import Layer, make_layer, patch_cells, put_patches, stacked
from .patch_noise_backdrop import PatchNoise
from .staleness_backdrop import measured_patches, reusable_patches
from .unexplained_changes_backdrop import ChangeWatch

WINDOW = 4  # frames in the running mean: noise falls, and slow drift is still followed
# Frames without a change after which a patch may be in the first layer, if it hardly ever changes.
SETTLED_LONG = 16
SETTLED_LATELY = 2  # the same for the second layer
CHANGE_RATE = 0.08  # of the running share of frames in which a patch changed
RARELY, OFTEN = 0.15, 0.6  # such shares: the most to enter the first layer, and the second
TOO_OFTEN = 0.35  # the same to stay in the first
SHOWN_RATE = 0.06  # of the running share of frames in which a patch showed what its first layer shows
SHOWN_ENOUGH = 0.7  # such a share, below which a patch is disowned
STALE_PRICE = (
    1.0  # what a stale token costs, in encodings of a patch, where a new first layer would not have it
)
HIDDEN_PRICE = 0.1  # the same for one that the second layer's token hides
MOST_SPARED_LOOKS = 64  # frames for which looks that explained everything are trusted
SMALLEST_GAIN = 1 / 64  # share of the patches that a new second layer must spare in the frame that makes it


@dataclass(frozen=True)
class Proposal:
    """New layers of a background, and whether the first of them is new."""

    layers: tuple[Layer, ...]
    first_is_new: bool


@dataclass(frozen=True, eq=False)
class FrameChange:
    """How a frame differs from those before it.

    Attributes:
        unchanged: bool `[P]`, patches within the tolerance of what they showed of late.
        structure: float32 `[P, 4]`, see `patch_structure`; None where the tolerance is 0.
        gradual: bool `[P]`, patches that were reused and that nothing entered since, as far as noise lets see. Where such a patch
            moved away from its reference within the tolerance, light or focus drifted: no figure came.
    """

    unchanged: np.ndarray
    structure: np.ndarray | None
    gradual: np.ndarray


class BackgroundTracker:
    """What the frames that matched one background showed. Not thread-safe.

    Args:
        image: uint8 `[S, S, 3]`, the first frame.
        layers: of the background.
        patch_size: pixels.
        tolerance: the matcher's, grey levels: within it a patch counts as unchanged.
        noise: what is known of each patch's noise, float32 `[P, 4]`.
        max_layers: 1 or 2.
    """

    def __init__(
        self,
        image: np.ndarray,
        layers: tuple[Layer, ...],
        patch_size: int,
        tolerance: float,
        noise: np.ndarray,
        max_layers: int = 2,
    ):
        self.patch_size = patch_size
        self.tolerance = tolerance
        self.max_layers = max_layers
        self.layers = layers
        self.estimate = image.copy()  # uint8 [S, S, 3]
        grid = image.shape[0] // patch_size
        patches = grid * grid
        # With tolerance 0 an unchanged patch has equal pixels, so there is nothing to average.
        self._mean = (
            patch_cells(image, patch_size).astype(np.float32) if tolerance > 0 else None
        )  # [g, p, g, 3 p]
        self.noise = PatchNoise(noise)
        self.watch = ChangeWatch(patches, patch_size)
        self.frames = 0  # taken in
        self._was_same = np.ones(patches, dtype=bool)  # the latest frame
        self.age = np.ones(patches, dtype=np.int32)  # frames since the last change
        self.changes = np.zeros(patches, dtype=np.float32)  # running share of frames with a change
        self.shown = np.ones(patches, dtype=np.float32)  # running share of frames that show the first layer
        self.objects = np.zeros(
            patches, dtype=bool
        )  # where the last detection found objects, if unchanged since
        self.second_waste = 0.0  # patches
        # What each patch would have spared of late, had the first layer treated it otherwise, in encodings.
        self._regret = np.zeros(patches, dtype=np.float32)
        self._gain = 0.0  # what a new second layer would spare in the latest frame
        self._shows_first = np.ones(patches, dtype=bool)  # the latest frame
        self._unexplained = np.zeros(patches, dtype=bool)  # in the latest frame: maybe another background's
        self._ever_owned = self._owned
        self._trust = self._spared_looks = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of memory."""
        arrays = (
            self.estimate,
            self.age,
            self.changes,
            self.shown,
            self.objects,
            self._shows_first,
            self._regret,
        )
        kept = sum(array.nbytes for array in arrays) + self.noise.num_bytes + self.watch.num_bytes
        kept += sum(layer.pixels.nbytes + layer.patch_mask.nbytes for layer in self.layers)
        return kept + (self._mean.nbytes if self._mean is not None else 0)

    # ---- learning

    def look_at(self, image: np.ndarray) -> "FrameChange":
        """How uint8 `[S, S, 3]` differs from what the frames showed of late. Nothing is changed by it."""
        if self.tolerance == 0:
            unchanged, _ = reusable_patches(self.estimate, image, self.patch_size, 0)
            return FrameChange(unchanged, None, unchanged)
        unchanged, structure = measured_patches(self.estimate, image, self.patch_size, self.tolerance)
        calm = unchanged & (structure <= self.noise.bounds()).all(axis=1)
        return FrameChange(unchanged, structure, calm & self._was_same)

    def update(
        self,
        image: np.ndarray,
        same: np.ndarray,
        change: "FrameChange | None" = None,
        is_object: np.ndarray | None = None,
    ) -> np.ndarray:
        """Takes in a matched frame.

        Args:
            image: uint8 `[S, S, 3]`.
            same: bool `[P]`, the patches that show what the layers show.
            change: what `look_at` gave for it, if it was asked.
            is_object: bool `[P]`, detected objects of the frame, where a detector ran.

        Returns:
            bool `[P]`, patches whose change nothing explains so far.
        """
        change = self.look_at(image) if change is None else change
        unchanged = change.unchanged
        if change.structure is not None:
            self.noise.observe(change.structure, unchanged & (self.age > 1))
        self._was_same = same
        self.objects &= unchanged
        if is_object is not None:
            self.objects |= is_object
        self.frames += 1
        self.age = np.where(unchanged, self.age + 1, 1)
        self.changes += np.float32(CHANGE_RATE) * (~unchanged - self.changes)
        self._average(image, unchanged)
        stale = self._owned & ~same
        unexplained = self.watch.unexplained(stale, unchanged, self.changes, self.objects)
        self._unexplained = unexplained
        self._count(image, same)
        return unexplained

    def _count(self, image: np.ndarray, same: np.ndarray) -> None:
        """Adds what the layers cost in this frame."""
        first = self.layers[0].patch_mask
        second = self._second_mask
        shows = same & first & ~second
        hidden = first & second
        if hidden.any():
            seen, _ = reusable_patches(self.layers[0].pixels, image, self.patch_size, self.tolerance)
            shows |= hidden & seen
        self._shows_first = shows
        rate = np.float32(max(SHOWN_RATE, 1 / (self.frames + 8)))
        self.shown += rate * (shows - self.shown)
        fresh = ~(same & self._owned)
        stale = first & ~shows & ~self._stays
        self._regret += np.float32(STALE_PRICE) * (stale & fresh) + np.float32(HIDDEN_PRICE) * (
            stale & ~fresh
        )
        # While a patch shows its layer, owning it spares what disowning it would have cost.
        self._regret = np.maximum(self._regret - shows, 0)
        if self.max_layers == 1:
            self._regret += fresh & self._settled_long
            return
        self._gain = (self._settled_lately & fresh).sum() + STALE_PRICE * (
            second & fresh & ~self._settled_lately
        ).sum()
        self.second_waste += self._gain

    def _average(self, image: np.ndarray, unchanged: np.ndarray) -> None:
        cells, estimate = patch_cells(image, self.patch_size), patch_cells(self.estimate, self.patch_size)
        if self._mean is None:
            changed = ~unchanged.reshape(cells.shape[0], -1)
            estimate.swapaxes(1, 2)[changed] = cells.swapaxes(1, 2)[changed]
            return
        weights = (1 / np.minimum(self.age, WINDOW)).astype(np.float32)
        step = cells - self._mean
        step *= weights.reshape(cells.shape[0], 1, -1, 1)
        self._mean += step
        np.add(self._mean, 0.5, out=step)
        np.copyto(estimate, step, casting="unsafe")  # rounds: a mean of uint8 is never negative

    @property
    def hidden(self) -> np.ndarray:
        """Bool `[P]`, patches of both layers of which the first does not show the latest frame."""
        return self.layers[0].patch_mask & self._second_mask & ~self._shows_first

    @property
    def disowned(self) -> np.ndarray:
        """Bool `[P]`, patches that were owned once and are not."""
        return self._ever_owned & ~self._owned

    def looks_due(self) -> bool:
        """Whether the detector must look at a frame of which much is unexplained; after looks that found objects it need not."""
        if self._spared_looks:
            self._spared_looks -= 1
            return False
        return True

    def note_look(self, objects: np.ndarray | None, explained: bool) -> None:
        """Learns from a look of the detector.

        Args:
            objects: bool `[P]`, what it found; None: there is no detector.
            explained: nothing of the frame is left unexplained.
        """
        self._trust = min(MOST_SPARED_LOOKS, max(1, 2 * self._trust)) if explained else 0
        self._spared_looks = self._trust
        if objects is not None:
            self.note_objects(objects)

    def note_objects(self, objects: np.ndarray) -> None:
        """Keeps patches from settling as long as they do not change.

        Args:
            objects: bool `[P]`, where a detector found objects in the latest frame.
        """
        self.objects = objects.copy()
        self.watch.forget(objects)

    # ---- what a new layer would be

    @property
    def _second_mask(self) -> np.ndarray:
        return self.layers[1].patch_mask if len(self.layers) > 1 else np.zeros_like(self.objects)

    @property
    def _owned(self) -> np.ndarray:
        return self.layers[0].patch_mask | self._second_mask

    @property
    def _settled_long(self) -> np.ndarray:
        return (self.age >= SETTLED_LONG) & (self.changes < RARELY) & ~self.objects & ~self._unexplained

    @property
    def _stays(self) -> np.ndarray:
        """Patches that show the first layer most of the time."""
        return (self.shown > SHOWN_ENOUGH) & (self.changes < TOO_OFTEN)

    @property
    def _settled(self) -> np.ndarray:
        settled = (self.age >= SETTLED_LATELY) & (self.changes < OFTEN)
        return settled & ~self.objects & ~self._unexplained

    @property
    def _settled_lately(self) -> np.ndarray:
        """Patches that a second layer would own now."""
        return self._settled & ~self._shows_first

    def _first_mask(self) -> np.ndarray:
        """The patches that a first layer made anew would own. What hides a patch now will go on hiding it for a while."""
        return self._settled_long | (self.layers[0].patch_mask & self._stays & self._shows_first)

    @property
    def first_waste(self) -> float:
        """What the first layer has cost that making it anew would spare from now on, in encodings.

        What passed by meanwhile does not count: a new layer would treat its patches as this one does.
        """
        old, new = self.layers[0].patch_mask, self._first_mask()
        return float(self._regret[(old & ~new) | (new & ~(old & self._shows_first))].sum())

    @property
    def due(self) -> int | None:
        """Which layer has by now cost as much as its encoding: 0 the first (and with it the second), 1 the second; None."""
        if self.first_waste >= max(self._first_mask().sum(), 1):
            return 0
        if self.max_layers == 1:
            return None
        smallest = max(1, SMALLEST_GAIN * len(self.age))
        return 1 if self._gain >= smallest and self.second_waste >= self._settled_lately.sum() else None

    def propose(self, due: int) -> Proposal | None:
        """The layers as they should be from now on; None where it is not worth it after all.

        Args:
            due: as `due` gave it.
        """
        first = self.layers[0]
        if due == 0:
            mask = self._first_mask()
            if not mask.any():
                return None
            # Patches that still show what the layer shows are replaced by their mean too, which has less noise.
            renewed = self._settled_long | (mask & self._shows_first)
            first = make_layer(
                put_patches(first.pixels, self.estimate, renewed, self.patch_size), mask, self.patch_size
            )
            shows, _ = reusable_patches(first.pixels, self.estimate, self.patch_size, self.tolerance)
            lately = self._settled & ~(mask & shows)
        else:
            lately = self._settled_lately
        layers: tuple[Layer, ...] = (first,)
        if self.max_layers == 2 and lately.any():
            layers = (first, make_layer(self.estimate, lately, self.patch_size))
        return Proposal(layers, due == 0)

    def adopt(self, proposal: Proposal) -> None:
        """From now on these are the background's layers."""
        if proposal.first_is_new:
            self._regret[:] = 0
            self.shown[self._settled_long] = np.maximum(self.shown[self._settled_long], 0.9)
        elif len(proposal.layers) > 1:
            # What has stayed long belongs into the first layer: encoding it in the second time after time is waste.
            self._regret += proposal.layers[1].patch_mask & self._settled_long
        self.second_waste = 0.0
        self._was_same = self._was_same | True
        self.layers = proposal.layers
        self._ever_owned = self._ever_owned | self._owned

    def branch(self, proposal: Proposal) -> "BackgroundTracker":
        """A tracker for another background that has split off from this one, which knows what this one knows."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(other, name, value.copy())
        other.noise = self.noise.copy()
        other.watch = self.watch.branch()
        other._regret[:] = 0
        other.adopt(proposal)
        return other

    def reset_waste(self, due: int) -> None:
        """Counts from zero again, where what was wasted is of no use after all (a parked object)."""
        if due == 0:
            self._regret[:] = 0
        self.second_waste = 0.0

    def with_change(self, image: np.ndarray, patches: np.ndarray, same: np.ndarray) -> Proposal:
        """Layers of another background that differs from this one in some patches, which its first layer does not own.

        Args:
            image: uint8 `[S, S, 3]`, a frame of it.
            patches: bool `[P]`, what differs, and some around it.
            same: bool `[P]`, the patches in which the frame shows what the layers of this background show.
        """
        first = self.layers[0]
        touched = bool((first.patch_mask & patches).any())
        both = put_patches(stacked(self.layers, self.patch_size).pixels, image, patches, self.patch_size)
        if self.max_layers == 1 or not (first.patch_mask & ~patches).any():
            owned = self._owned | patches
            return Proposal((make_layer(both, owned, self.patch_size),), True)
        if touched:
            first = make_layer(first.pixels, first.patch_mask & ~patches, self.patch_size)
        second = patches | (self._second_mask & same)
        return Proposal((first, make_layer(both, second, self.patch_size)), touched)
