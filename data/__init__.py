"""Public data sets as rows of images and messages."""
