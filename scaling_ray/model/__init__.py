"""The masked-gene transformer: sizes (no torch), masks, network, objectives, closed-form baselines."""
