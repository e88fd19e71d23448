"""The small YOLO of the made scenes."""

from PIL import Image


def test_importing_it_leaves_the_opening_of_images_as_it_was():
    """ultralytics answers an image that cannot be read by installing a package, in the whole process."""
    before = Image.open
    import backdrop.scenes.detector  # noqa: F401

    assert Image.open is before and before.__module__ == "PIL.Image"
