"""Public datasets as rows of images and messages."""
