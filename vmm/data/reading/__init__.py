"""Media files → pictures and sound by time: one core for training, embedding and building, strict or lenient."""
