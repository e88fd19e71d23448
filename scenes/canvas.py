"""A copy of a background to which objects are added."""

from PIL import Image

from .drawing import Layer
from .labels import ClassMaps, SceneObject


class Canvas:
    """A background's image and label maps, copied, and the objects added so far.

    Attributes:
        image: RGBA, S x S.
        maps: the labels; text on objects is marked here by whoever draws it.
        objects: in the order in which they were added, boxes in pixels of `image`.
    """

    def __init__(self, image: Image.Image, maps: ClassMaps, zoom: int) -> None:
        self.image = image.copy()
        self.maps = maps.copy()
        self.objects: list[SceneObject] = []
        self._zoom = zoom

    def layer(self, width: int, height: int) -> Layer:
        """An empty layer of so many design pixels, to draw an object on."""
        return Layer(width, height, self._zoom)

    def add(
        self,
        name: str,
        layer: Layer,
        x: int,
        y: int,
        thing: str,
        colour: str | None = None,
    ) -> None:
        """Draws the layer at design pixel (x, y); its box is what the layer covers, so nothing else changes.

        Args:
            name: detector class of the object.
            thing, colour: its dense labels.
        """
        drawn = layer.flatten()
        x0, y0, x1, y1 = drawn.getchannel("A").getbbox()
        left, top = x * self._zoom, y * self._zoom
        self.image.alpha_composite(drawn, (left, top))
        box = (left + x0, top + y0, left + x1, top + y1)
        self.objects.append(SceneObject(name, box))
        first, last = (v // self._zoom for v in box[:2]), (-(-v // self._zoom) for v in box[2:])
        self.maps.mark((*first, *last), thing=thing, colour=colour)
