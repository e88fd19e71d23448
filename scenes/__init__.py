"""The made world: drawing, families, cameras, rows of questions, its detector, tower, base model and exam."""
