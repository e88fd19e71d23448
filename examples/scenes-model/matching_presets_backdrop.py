"""Options of matching that suit a kind of picture, by name."""

import numbers

PRESETS: dict[str, dict] = {
    # Drawn pixels are equal or they are not: nothing is lost.
    "screen": {"tolerance": 0.0},
    # Noise, compression and slow light; what stands out of a patch's own noise is fresh.
    "camera": {"tolerance": 10.0, "learn_noise": True},
}


def matching_options(preset: object, tolerance: float | None, options: dict) -> dict:
    """The options of `BackgroundMatcher` that a preset, a tolerance and options on top of them make.

    Args:
        preset: a name of `PRESETS`; a number is a tolerance; None: neither.
        tolerance: grey levels 0-255; None: the preset's, else 0.
        options: take precedence over the preset's.

    Raises:
        ValueError: no such preset, or two tolerances.
    """
    if preset is not True and isinstance(preset, numbers.Real):
        if tolerance is not None:
            raise ValueError(f"Two tolerances are given, {preset} and {tolerance}; wanted one.")
        preset, tolerance = None, preset
    if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
        raise ValueError(f"preset is {preset!r}; wanted one of {sorted(PRESETS)}.")
    chosen = {"tolerance": 0.0, **PRESETS.get(preset or "", {}), **options}
    return chosen if tolerance is None else {**chosen, "tolerance": tolerance}
