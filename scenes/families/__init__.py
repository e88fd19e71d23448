"""The families of scenes. To add one: write a file like `panel.py` beside this one, and add its class below.

Scenes of the other families stay as they are, byte for byte. What is drawn from all families (`sample_scenes`, training
rows) changes, and a new family has classes that a trained tower and detector do not know: both are to be trained anew
(`backdrop scenes model`).
"""

from .family import Family
from .panel import Panel
from .phone import Phone
from .street import Street

ALL: tuple[Family, ...] = (Phone(), Street(), Panel())
